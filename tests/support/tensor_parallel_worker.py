"""One rank of several: loads models spread over all ranks, and writes what it computed and which rows it held.

torchrun --nproc-per-node 2 tensor_parallel_worker.py FOLDER_OF_MODELS OUT
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.small_models import tokens
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import diffattn  # noqa: F401 - registers the model with the Auto classes
from diffattn.errors import ConfigError
from diffattn.ops.cpu import operator as fused_cpu

HELD = ("q_proj", "k_proj", "v_proj", "o_proj", "lambda_proj")


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results(folder: Path) -> dict[str, torch.Tensor]:
    ids = tokens(2, 9)
    found = {}
    calls = []
    kernel = fused_cpu.fused_cpu_diff_attention

    def counted(*args, **kwargs):
        calls.append(args[0].q1.shape[2])
        return kernel(*args, **kwargs)

    fused_cpu.fused_cpu_diff_attention = counted
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    for implementation in dict.fromkeys((model.config._attn_implementation, "sdpa")):
        model.set_attn_implementation(implementation)
        calls.clear()
        with torch.no_grad():
            found[f"logits {implementation}"] = model(ids).logits
        # Output heads that the kernel was given in a layer, 0 where it did not serve.
        found[f"kernel {implementation}"] = torch.tensor(calls[0] if calls else 0)
    found["text"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    static = {"cache_implementation": "static", "disable_compile": True}
    found["text, static cache"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **static)
    for name in HELD:
        if (projection := getattr(model.model.layers[1].self_attn, name, None)) is not None:
            found[name] = local(projection.weight).detach()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        found[f"gradient {name}"] = whole(parameter.grad)
    fused_cpu.fused_cpu_diff_attention = kernel
    return {name: tensor.contiguous().clone() for name, tensor in found.items()}


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    said = {}
    for path in sorted(folder.iterdir()):
        try:
            found = results(path)
        except ConfigError as error:
            said[path.name] = str(error)
        else:
            save_file(found, out / f"{path.name} {dist.get_rank()}.safetensors")
    if dist.get_rank() == 0:
        (out / "said.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
