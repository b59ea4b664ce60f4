"""What other engines make of a model: each continues a text with the tokens of ``generate``, beside Llama's outcome."""

import json
import os

import numpy as np
import pytest
import torch
from support.small_exports import model_of
from support.small_models import tokens
from transformers import LlamaConfig, LlamaForCausalLM

from diffattn.export.fixed import FixedDecoder
from diffattn.export.genai import genai_config
from diffattn.export.graph import save, shares_buffers, to_graph
from diffattn.export.run import PAST, PRESENT

# What the tools warn of is theirs.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]

ATTENTIONS = ("softmax", "diff_v1", "diff_v2", "diff_gda", "diff_gda_v2", "gated", "dex")
NEW = 12
PROMPT = tokens(1, 5)


@pytest.fixture(params=ATTENTIONS)
def model(request):
    return model_of(request.param)


def greedy(model):
    """The new tokens of the library's own loop."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(PROMPT, **options)[0, PROMPT.shape[1] :].tolist()


def written(step):
    """The new tokens of ``step(token (1, 1), place (1,)) -> logits (1, V)``, which takes the prompt one by one, too."""
    found = PROMPT[0].tolist()
    for place in range(len(found) + NEW - 1):
        logits = step(torch.tensor([[found[place]]]), torch.tensor([place]))
        if place + 1 == len(found):
            found.append(int(logits.argmax()))
    return found[PROMPT.shape[1] :]


def exported(model):
    with torch.no_grad():
        return torch.export.export(FixedDecoder(model, 32), (torch.tensor([[1]]), torch.tensor([0])))


def test_aot_inductor(model, tmp_path):
    expected = greedy(model)
    package = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    assert written(torch._inductor.aoti_load_package(package)) == expected


def test_executorch_with_xnnpack(model, tmp_path):
    exir = pytest.importorskip("executorch.exir")
    xnnpack = pytest.importorskip("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    runtime = pytest.importorskip("executorch.runtime")
    expected = greedy(model)
    partitioner = xnnpack.XnnpackPartitioner()
    program = exir.to_edge_transform_and_lower(exported(model), partitioner=[partitioner]).to_executorch()
    assert b"XnnpackBackend" in program.buffer
    (tmp_path / "model.pte").write_bytes(program.buffer)
    method = runtime.Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    assert written(lambda token, place: method.execute([token, place])[0]) == expected


def test_llama_in_the_librarys_own_module_is_not_compiled():
    """Release 5.23 of transformers counts what its cache holds in a constant of the graph, which may not be written."""
    executorch = pytest.importorskip("transformers.integrations.executorch")
    sizes = {"vocab_size": 71, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()
    llama.generation_config.cache_implementation = "static"
    llama.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 32, "device": "cpu"}
    module = executorch.TorchExportableModuleWithStaticCache(llama)
    given = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
    with torch.no_grad():
        program = torch.export.export(module, (), given, strict=False)
    with pytest.raises(RuntimeError, match="mutating a non-functional tensor"):
        torch._inductor.aoti_compile_and_package(program)


def test_openvino(model, tmp_path):
    openvino = pytest.importorskip("openvino")
    expected = greedy(model)
    save(to_graph(model, repeat_heads=True), tmp_path)
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shape = (1, model.config.num_key_value_heads, 0, model.config.head_dim)
    names = [name for each in compiled.inputs for name in each.names if name.startswith(PAST)]
    past = {name: np.zeros(shape, np.float32) for name in names}
    text, new = PROMPT.numpy(), PROMPT.numpy()
    for _ in range(NEW):
        places = np.arange(text.shape[1] - new.shape[1], text.shape[1])[None]
        given = {"input_ids": new, "attention_mask": np.ones_like(text), "position_ids": places}
        found = compiled(given | past)
        past = {name: found[name.replace(PAST, PRESENT)].copy() for name in past}
        new = found["logits"][:, -1].argmax(-1)[:, None]
        text = np.concatenate([text, new], axis=1)
    assert text[0, PROMPT.shape[1] :].tolist() == expected


def test_onnxruntime_genai(model, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    expected = greedy(model)
    # Where none is named, the engine takes token 0 for the end of a text.
    model.generation_config.eos_token_id = next(token for token in range(71) if token not in expected)
    save(graph := to_graph(model), tmp_path)
    (tmp_path / "genai_config.json").write_text(json.dumps(genai_config(model, shared=shares_buffers(graph))))
    options = genai.GeneratorParams(loaded := genai.Model(os.fspath(tmp_path)))
    options.set_search_options(max_length=PROMPT.shape[1] + NEW)
    generator = genai.Generator(loaded, options)
    generator.append_tokens(PROMPT[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[PROMPT.shape[1] :].tolist() == expected
