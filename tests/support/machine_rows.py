"""A row of a machine as `diffattn doctor --benchmark` writes it, for tests of what reads it."""

from typing import Any

from diffattn.results.machine import AttentionTime, MachineRow, Rates, Speed, Spread


def machine_row(**fields: Any) -> MachineRow:
    """A row of round numbers, with other fields where they are given."""
    speeds = tuple(
        Speed(
            engine=engine, attention=attention, bits=bits, phase="decoding", tokens=tokens,
            tokens_per_second=Spread(median=median, p20=0.9 * median, p80=1.1 * median),
            at_most=2 * median, reached=0.5,
        )
        for engine, bits, attention, tokens, median in (
            ("torch", 32, "softmax", 128, 50.0), ("torch", 32, "diff_v2", 128, 49.0),
            ("torch", 32, "softmax", 2048, 40.0), ("torch", 32, "diff_v2", 2048, 41.0),
            ("onnxruntime", 8, "softmax", 128, 90.0), ("onnxruntime", 8, "diff_v2", 128, 81.0),
            ("onnxruntime", 8, "softmax", 2048, 60.0), ("onnxruntime", 8, "diff_v2", 2048, 57.0),
        )
    )  # fmt: skip
    values: dict[str, Any] = {
        "benchmark": "machine", "form": 1, "name": "Raspberry Pi 5 Model B Rev 1.0", "architecture": "aarch64",
        "system": "Linux 6.12", "cores": 4, "threads": 4, "memory": 8 << 30, "kernel": "fused_cpu", "python": "3.11.2",
        "diffattn": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0", "date": "2026-11-27", "load": 0.1,
        "celsius": (48.0, 61.5), "parameters": {"softmax": 34083840, "diff_v2": 34100224},
        "rates": Rates(read=1e10, copy=1.1e10, disk=9e7, fp32=7e10, bf16=1e10),
        "attention": (AttentionTime(attention="diff_v2", phase="decoding", tokens=2048,
                                    seconds=Spread(median=2e-3, p20=1e-3, p80=3e-3)),),
        "speeds": speeds, "seconds": 80.5, "command": "diffattn doctor --benchmark",
    }  # fmt: skip
    return MachineRow(**values | fields)
