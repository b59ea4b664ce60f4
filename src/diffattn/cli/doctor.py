"""The verb ``diffattn doctor``."""

from __future__ import annotations

import sys
from json import dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffattn.results.machine import MachineRow


def doctor(*, build: bool = False, benchmark: bool = False, json: bool = False) -> int:
    """Say what diffattn uses on this machine: versions, processor, kernel, GPU, cache.

    Examples:
        diffattn doctor --build
        diffattn doctor --benchmark

    Args:
        build: Compile the fused kernel now, also where it was compiled before; exit status 1 where that fails.
        benchmark: Measure this machine with small models, which takes a minute or two, and print the result as one
            line of JSON on stdout. docs/small_machines.md says where to post it.
    """
    from diffattn.cli.terminal.board import Board
    from diffattn.cli.terminal.console import print_json
    from diffattn.cli.terminal.screen import screen, wrapped
    from diffattn.errors import UnsupportedError
    from diffattn.progress import Stage

    failure = None
    with Board(keep=False) as board:
        board.importing()
        from diffattn.model.doctor import examine
        from diffattn.ops.cpu.build import compile_kernel

        if build:
            board(Stage("compiling the kernel"))
            try:
                compile_kernel(force=True)
            except UnsupportedError as error:
                failure = str(error)
        row = None
        if benchmark:
            from diffattn.study.machine_benchmark import benchmark_machine

            row = benchmark_machine(on_stage=board)
        facts = examine() | ({"build_failure": failure} if build else {})
    if row is not None:
        _show(row)
        # The line alone on stdout; with --json it is a part of the one object.
        if json:
            facts["benchmark"] = row.to_json()
        else:
            print(dumps(row.to_json(), ensure_ascii=True))
    if json:
        print_json(facts)
    else:
        shown, console = lines(facts), screen()
        if console.is_terminal:
            # A pipe keeps a fact on its line, for who searches it.
            shown = [wrapped(line, console.width, indent="  ") for line in shown]
        print("\n".join(shown), file=sys.stderr)
    if failure is not None:
        print(f"diffattn: {failure}", file=sys.stderr)
    return 0 if failure is None else 1


def _show(row: MachineRow) -> None:
    """Shows a person what was measured."""
    from diffattn.cli.terminal.screen import say
    from diffattn.cli.terminal.table import show
    from diffattn.humanize import flops

    rates = row.rates
    read, copied, disk = (f"{rate / 1e9:.3g} GB/s" for rate in (rates.read, rates.copy, rates.disk))
    say(
        f"memory: reads {read}, copies {copied}; disk: {disk}; products: float32 {flops(rates.fp32)}/s, bfloat16 "
        f"{flops(rates.bf16)}/s; the whole took {row.seconds:.0f} s",
        "Reached is the share of the tokens per second that the planner allows with these rates.",
    )
    if row.onnxruntime is None:
        say("onnxruntime is not installed, so only torch was measured: pip install 'diffattn[onnx]'")
    show(speed_table(row))


def speed_table(row: MachineRow) -> list[list[str]]:
    """Returns the speeds as a table; the first row is the header."""
    head = ["engine", "attention", "bits", "work", "tokens/s", "reached"]
    work = {"prefill": "reading {} tokens", "decoding": "writing behind {} tokens"}
    return [
        head,
        *(
            [
                speed.engine, speed.attention, str(speed.bits), work[speed.phase].format(f"{speed.tokens:,}"),
                f"{speed.tokens_per_second.median:.3g}", f"{speed.reached:.0%}",
            ]
            for speed in row.speeds
        ),
    ]  # fmt: skip


def lines(facts: dict[str, Any]) -> list[str]:
    """Returns the lines that tell a person what ``examine`` found."""
    kernel = facts["fused_cpu"]
    dtypes = dict.fromkeys(kernel["active"], "active") | kernel["reasons"]
    if not kernel["active"] and len(set(dtypes.values())) == 1:
        # Such as the system: said once.
        dtypes = {", ".join(dtypes): dtypes.popitem()[1]}
    seconds = f", compiled in {kernel['compile_seconds']:.0f} s" if kernel["compile_seconds"] is not None else ""
    origin = ", shipped with diffattn" if kernel["shipped"] else seconds
    refused = [f"shipped kernel, not used: {kernel['shipped_refused']}"] if kernel["shipped_refused"] else []
    return [
        "  ".join(f"{name} {number}" for name, number in facts["versions"].items()),
        f"processor: {facts['processor']}, {kernel['capability']}, {kernel['threads']} threads",
        f"compiler: {kernel['compiler'] or 'none found'}",
        *(f"fused kernel, {name}: {state.removeprefix('fused_cpu: ')}" for name, state in dtypes.items()),
        *([_products(kernel["bf16_products"])] if kernel["bf16_products"] is not None else []),
        f"fused kernel's file: {kernel['path'] or 'none'}{origin}",
        *refused,
        *(_backend(name, backend) for name, backend in facts["backends"].items()),
        *(f"diff_attention on CPU, {dtype}: {used}" for dtype, used in facts["diff_attention"].items()),
        *(f"the model's attention on CPU, {dtype}: {used}" for dtype, used in facts["model_attention"].items()),
        *(line for gpu in facts["gpus"] for line in _gpu(gpu)),
        *([] if facts["gpus"] else ["GPU: none that PyTorch can use"]),
        f"cache folder: {facts['cache']['path']}, {facts['cache']['bytes'] / 1e6:.1f} MB, {_writing(facts['cache'])}",
    ]


def _backend(name: str, facts: dict[str, str | None]) -> str:
    package = f", from {facts['package']}" if facts["package"] else ""
    return facts["broken"] or f"backend {name}: {facts['hardware']}{package}"


def _gpu(facts: dict[str, Any]) -> list[str]:
    """A line with the GPU's name, and one for the dtypes that the same backends serve, with the reasons."""
    device = facts["device"]
    said: dict[tuple[str, str, str], list[str]] = {}
    for dtype, answers in facts["serves"].items():
        asked = ("diff_attention", "models")
        words = [_answers(answers[who]) for who in asked]
        whom = {" and ".join(asked): words[0]} if words[0] == words[1] else dict(zip(asked, words, strict=True))
        why = "; ".join(answers["reasons"])
        for who, served in whom.items():
            said.setdefault((who, served, why), []).append(dtype)
    lines = [
        f"{who} on {device}, {', '.join(dtypes)}: {served}{f' ({why})' if why else ''}"
        for (who, served, why), dtypes in said.items()
    ]
    return [f"GPU {device}: {facts['name']}", *lines]


def _answers(served: dict[str, str]) -> str:
    """The backend of most calls, and the calls that another one serves."""
    names = list(served.values())
    most = max(names, key=names.count)
    return "; ".join([most, *(f"{call}: {name}" for call, name in served.items() if name != most)])


def _writing(cache: dict[str, Any]) -> str:
    if cache["unwritable"] is None:
        return "can be written"
    return f"cannot be written ({cache['unwritable']}): name a folder that can be with DIFFATTN_CACHE"


def _products(bfloat16: bool) -> str:
    if bfloat16:
        return "fused kernel's products: bfloat16 in bfloat16, float16 in float32"
    return "fused kernel's products: in float32, also of bfloat16 and float16: this processor has none of bfloat16"
