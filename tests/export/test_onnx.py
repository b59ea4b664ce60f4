import json

import numpy as np
import onnx_ir
import pytest
import torch
from support.small_exports import (
    ATTENTIONS,
    copy,
    decoder,
    every_option,
    layers,
    model_of,
    padded,
    small_checkpoint,
    traced,
    traced_checkpoint,
    traced_every_option,
    whole,
)
from support.small_folders import small_folder
from support.small_models import SHAPE, assert_same_logits, tokens
from transformers import GenerationConfig

from diffattn.cli.main import main
from diffattn.export import graph as onnx_graph
from diffattn.export import onnx as onnx_export
from diffattn.export import run as onnx_run
from diffattn.export.check import check_float32
from diffattn.export.genai import genai_config
from diffattn.export.run import OnnxDecoder
from diffattn.model.loading import load_model

CACHED = [(attention, True) for attention in ATTENTIONS]
EVERY = [*CACHED, *((attention, False) for attention in ATTENTIONS), ("gated", False)]
GROUPED = ("diff_gda", "diff_gda_v2")
# Traced with 2 rows, 3 new tokens and 5 earlier ones; none of these sizes is.
SIZES = [(1, 1), (1, 37), (5, 17), (7, 4)]


@pytest.fixture(
    params=[*EVERY, *(pytest.param((attention, True), marks=pytest.mark.full) for attention in GROUPED)],
    ids=lambda case: f"{case[0]}-{'cache' if case[1] else 'whole'}",
    scope="module",
)
def exported(request, tmp_path_factory):
    attention, cache = request.param
    return model_of(attention, layers(cache)), decoder(traced(attention, cache), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("batch", "length"), SIZES)
def test_logits_are_the_models(exported, batch, length):
    model, session = exported
    ids = tokens(batch, length)
    logits, cache = session.logits(ids.numpy())
    assert_same_logits(torch.from_numpy(logits), whole(model, ids, torch.ones_like(ids)))
    assert cache.length == (length if session.has_cache else 0)


def test_padding_on_the_left_is_not_seen(exported):
    model, session = exported
    ids, mask = padded(5, 13, padding=11)
    logits, _ = session.logits(ids.numpy(), mask.numpy())
    real = mask.bool()
    assert_same_logits(torch.from_numpy(logits)[real], whole(model, ids, mask)[real])
    # The row that is padded most has the logits that its tokens have alone.
    alone, _ = session.logits(ids[-1:, 11:].numpy())
    assert_same_logits(torch.from_numpy(logits[-1, 11:]), torch.from_numpy(alone[0]))


@pytest.mark.parametrize("pieces", [(1,) * 11, (7, 1, 1, 2), (2, 9), (11,)], ids=str)
def test_pieces_through_the_cache_are_one_pass(cached, pieces):
    model, session = cached
    ids, mask = padded(3, 11, padding=5)
    outputs, cache, start = [], None, 0
    for piece in pieces:
        stop = start + piece
        logits, cache = session.logits(ids[:, start:stop].numpy(), mask[:, :stop].numpy(), cache)
        outputs.append(torch.from_numpy(logits))
        start = stop
    real = mask.bool()
    assert_same_logits(torch.cat(outputs, dim=1)[real], whole(model, ids, mask)[real])


def test_greedy_text_is_that_of_generate(exported):
    model, session = exported
    ids, mask = padded(3, 7, padding=4)
    settings = GenerationConfig(max_new_tokens=19, do_sample=False, pad_token_id=0, eos_token_id=None)
    text = model.generate(ids, attention_mask=mask, generation_config=settings)
    assert session.generate(ids.numpy(), 19, attention_mask=mask.numpy()).tolist() == text.tolist()


@pytest.mark.parametrize(
    ("attention", "cache"), [*EVERY, *(pytest.param(attention, True, marks=pytest.mark.full) for attention in GROUPED)]
)
def test_the_graph_has_one_attention_a_layer_and_holds_no_length(attention, cache):
    graph = traced(attention, cache).graph
    config = model_of(attention, 1).config
    nodes = list(graph)
    call = ("com.microsoft", "GroupQueryAttention") if cache else ("", "Attention")
    assert [(node.domain, node.op_type) for node in nodes if "Attention" in node.op_type] == [call] * layers(cache)
    assert {node.domain for node in nodes if node.op_type != call[1]} == {""}
    assert not [node.op_type for node in nodes if node.op_type in ("If", "Loop", "Softmax")]
    weights = dict(model_of(attention, layers(cache)).named_parameters())
    made = {name: value for name, value in graph.initializers.items() if name not in weights}
    # What is no weight is a number, a list of axes, a gain or the frequencies; DEX's λ·W_D is heads × d × d.
    assert max(value.const_value.size for name, value in made.items()) <= (300 if attention == "dex" else 20)
    inputs = {value.name: [str(size) for size in value.shape] for value in graph.inputs}
    earlier = "past_sequence_length"
    assert inputs.pop("input_ids") == inputs.pop("position_ids") == ["batch_size", "sequence_length"]
    total = f"{earlier} + sequence_length" if cache else "sequence_length"
    assert inputs.pop("attention_mask") == ["batch_size", total]
    sizes = [str(config.num_key_value_heads), str(config.head_dim)]
    names = [f"{layer}.{kind}" for layer in range(layers(cache) if cache else 0) for kind in ("key", "value")]
    assert not cache or inputs.pop("num_logits_to_keep") == []
    assert inputs == {f"past_key_values.{name}": ["batch_size", sizes[0], earlier, sizes[1]] for name in names}
    outputs = {value.name: [str(size) for size in value.shape] for value in graph.outputs}
    # onnxruntime-genai reads off this size that the graph gives the last logits.
    kept = "1" if cache else "sequence_length"
    assert outputs.pop("logits") == ["batch_size", kept, str(SHAPE.vocab_size)]
    assert outputs == {f"present.{name}": ["batch_size", sizes[0], total, sizes[1]] for name in names}


def test_a_tied_embedding_is_in_the_file_once():
    model = model_of("diff_v1")
    bytes_of = onnx_graph.weight_bytes(traced("diff_v1", True))
    assert bytes_of == pytest.approx(4 * model.num_parameters(), rel=0.02)


def test_every_option_of_the_configuration_is_exported(tmp_path):
    model, graph = every_option(), traced_every_option()
    assert onnx_graph.weight_bytes(graph) == pytest.approx(4 * model.num_parameters(), rel=0.02)
    ids, mask = padded(3, 11, padding=5)
    logits, _ = decoder(graph, tmp_path).logits(ids.numpy(), mask.numpy())
    assert_same_logits(torch.from_numpy(logits)[mask.bool()], whole(model, ids, mask)[mask.bool()])


@pytest.mark.full
def test_layers_with_a_window_and_without_positions_are_exported(tmp_path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3, "unrotated_layers": [1]}
    model = model_of("diff_v1", **kinds)
    session = decoder(onnx_graph.to_graph(model), tmp_path)
    ids, mask = padded(3, 11, padding=5)
    wanted, real = whole(model, ids, mask), mask.bool()
    for pieces in ((11,), (4, 1, 6)):
        outputs, cache, start = [], None, 0
        for piece in pieces:
            stop = start + piece
            logits, cache = session.logits(ids[:, start:stop].numpy(), mask[:, :stop].numpy(), cache)
            outputs.append(torch.from_numpy(logits))
            start = stop
        assert_same_logits(torch.cat(outputs, dim=1)[real], wanted[real])
    plain = model_of("diff_v1")
    assert (whole(plain, ids, mask) - wanted)[real].abs().max() > 0.1
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    text = model.generate(ids, attention_mask=mask, generation_config=settings)
    assert session.generate(ids.numpy(), 9, attention_mask=mask.numpy()).tolist() == text.tolist()


def test_weights_that_are_too_much_for_one_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 10_000)
    (tmp_path / "first").mkdir()
    onnx_graph.save(traced("softmax", True), tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "moved")
    names = sorted(path.name for path in (tmp_path / "moved").iterdir())
    assert names == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "moved/model.onnx").stat().st_size < (tmp_path / "moved/model.onnx.data").stat().st_size
    ids = tokens(3, 5)
    logits, _ = OnnxDecoder(tmp_path / "moved").logits(ids.numpy())
    assert_same_logits(torch.from_numpy(logits), whole(model_of("softmax"), ids, torch.ones_like(ids)))


def test_exporting_leaves_the_model_as_it_was_and_is_repeatable():
    model = model_of("softmax", 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    again = onnx_graph.to_graph(model, cache=False)
    first, second = (
        onnx_ir.to_proto(graph).SerializeToString(deterministic=True) for graph in (traced("softmax", False), again)
    )
    assert first == second
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def scaled(name_of, factor):
    def change(graph):
        value = name_of(graph)
        array = value.const_value.numpy() * np.float32(factor)
        value.const_value = onnx_ir.tensor(array.astype(np.float32), name=value.name)

    return change


def lam(graph):
    """−λ of the first layer, the only number that the noise map's output is multiplied by."""
    wanted = -float(model_of("diff_v1").model.layers[0].self_attn.lam().detach())
    found = [
        value
        for value in graph.initializers.values()
        if value.const_value.size == 1 and abs(float(value.const_value.numpy().item()) - wanted) < 1e-6
    ]
    assert len(found) == 1
    return found[0]


def mask_off_by_one(graph):
    node = next(node for node in graph if node.op_type == "LessOrEqual")
    less = onnx_ir.node("Less", list(node.inputs))
    graph.insert_before(node, less)
    node.outputs[0].replace_all_uses_with(less.outputs[0])


def maps_swapped(graph):
    """q of the noise map for q of the signal map: the two halves of W_Q of a pair of heads change places."""
    value = graph.initializers["model.layers.1.self_attn.q_proj.weight"]
    array = value.const_value.numpy().copy()
    array[:, :16] = np.roll(array[:, :16], 8, axis=1)
    value.const_value = onnx_ir.tensor(array, name=value.name)


WRONG = {
    "lambda off by a thousandth": scaled(lam, 1.001),
    "rotary frequencies off": scaled(lambda graph: graph.initializers["model.rotary_emb.inv_freq"], 1.001),
    "a gain off": scaled(lambda graph: graph.initializers["model.norm.weight"], 1.0001),
    "mask off by one": mask_off_by_one,
    "maps of one pair swapped": maps_swapped,
}


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in WRONG.items()])
def test_the_check_rejects_known_wrong_graphs(change, tmp_path):
    model = model_of("diff_v1")
    graph = copy(traced("diff_v1", True))
    change(graph.graph)
    onnx_graph.save(graph, tmp_path)
    report = check_float32(model, tmp_path)
    assert not report.passed
    assert report.error > report.bound


@pytest.mark.parametrize(("attention", "cache"), [("diff_v1", True), ("dex", True), ("diff_v2", False)])
def test_the_check_passes_the_right_graph(attention, cache, tmp_path):
    model = model_of(attention, layers(cache))
    onnx_graph.save(traced(attention, cache), tmp_path)
    report = check_float32(model, tmp_path)
    assert report.passed
    assert report.identical_texts == report.texts == 12
    # The bound is rounding, not a tolerance that anything passes.
    assert 1e-6 < report.bound < 1e-4
    assert model.dtype == torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_the_verb_exports_checks_and_says_so(folder, tmp_path, capsys):
    out = tmp_path / "export"
    assert main(["export", str(folder), "--onnx", "--check", "--json", "--out", str(out)]) == 0
    said, shown = capsys.readouterr()
    result = json.loads(said)
    assert result["folder"] == str(out)
    assert result["check"]["error"] <= result["check"]["bound"]
    assert result["check"]["identical_texts"] == 12
    assert result["file_bytes"] == (out / "model.onnx").stat().st_size
    assert "12 of 12 greedy texts of 32 tokens are identical" in shown
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.onnx"} <= {p.name for p in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    ids = tokens(2, 7)
    logits, _ = OnnxDecoder(out).logits(ids.numpy())
    model = load_model(folder, "float32", "cpu")
    assert_same_logits(torch.from_numpy(logits), whole(model, ids, torch.ones_like(ids)))
    # What it wrote is not overwritten.
    written = (out / "model.onnx").stat().st_mtime_ns
    assert main(["export", str(folder), "--onnx", "--out", str(out)]) == 2
    assert "wanted a new or an empty folder" in capsys.readouterr().err
    assert (out / "model.onnx").stat().st_mtime_ns == written


def test_a_wrong_export_is_reported_and_not_kept(folder, tmp_path, capsys, monkeypatch):
    def wrong(model, **options):
        graph = copy(traced_checkpoint(folder))
        scaled(lambda inner: inner.initializers["model.norm.weight"], 1.001)(graph.graph)
        return graph

    monkeypatch.setattr(onnx_export, "to_graph", wrong)
    assert main(["export", str(folder), "--onnx", "--no-cache", "--check", "--out", str(tmp_path / "export")]) == 1
    assert "the exported graph computes something else (" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def llama(path):
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--onnx", "{absent}"], "; wanted the folder of a checkpoint: "),
        (["--onnx", "{file}"], "is a file; wanted the folder of a checkpoint: "),
        (["--onnx", "{empty}"], "holds no config.json"),
        (["--onnx", "{llama}"], "model_type is 'llama'"),
        (["{folder}"], "no format; wanted --onnx: "),
        (["--onnx", "{folder}", "--bits", "3"], "--bits"),
        (["--onnx", "{folder}", "--block-size", "48"], "block_size is 48; wanted one of 16, 32, 64, 128, 256"),
        (["--onnx", "{folder}", "--out", "{full}"], "wanted a new or an empty folder"),
        (["--onnx", "{folder}", "--out", "{file}"], "wanted a new or an empty folder"),
        (
            ["--onnx", "{folder}", "--out", "{file}/export"],
            "(Not a directory); wanted a folder that can be written",
        ),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(options, line, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").write_text("text")
    llama(tmp_path / "llama")
    places = {name: str(tmp_path / name) for name in ("absent", "file", "empty", "full", "llama")}
    before = sorted(path.name for root in (tmp_path, folder) for path in root.rglob("*"))
    assert main(["export", *(option.format(folder=folder, **places) for option in options)]) == 2
    said, shown = capsys.readouterr()
    assert said == ""
    assert len(shown.splitlines()) == 1
    assert line in shown
    assert sorted(path.name for root in (tmp_path, folder) for path in root.rglob("*")) == before


def test_without_the_extra_one_line_says_how_to_install_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_run.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else True)
    assert main(["export", str(folder), "--onnx", "--out", str(tmp_path / "export")]) == 2
    shown = capsys.readouterr().err
    assert "onnxscript is not installed; wanted " in shown
    assert ": pip install 'diffattn[onnx]'" in shown
    assert list(tmp_path.iterdir()) == []


def test_frequencies_that_depend_on_the_length_are_refused(tmp_path, capsys):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    path = small_folder(tmp_path / "checkpoint", rope_parameters=rope)
    assert main(["export", str(path), "--onnx"]) == 2
    assert "rope_type is 'dynamic', whose frequencies depend on the length" in capsys.readouterr().err
    assert not (path / "onnx").exists()


def test_the_file_for_onnxruntime_genai_names_what_the_graph_has(cached):
    model, decoder = cached
    whole = genai_config(model, shared=decoder.shares_buffers)
    assert whole["search"]["past_present_share_buffer"] is True
    said = whole["model"]
    parts = said["decoder"]
    layers = range(parts["num_hidden_layers"])
    for side, names, whole in (("inputs", decoder.past_names, "past"), ("outputs", decoder.outputs[1:], "present")):
        patterns = [parts[side][f"{whole}_{kind}_names"] for kind in ("key", "value")]
        assert names == [pattern % layer for layer in layers for pattern in patterns]
    assert decoder.empty_cache(1).values[0].shape() == [1, parts["num_key_value_heads"], 0, parts["head_size"]]
    assert "eos_token_id" not in said
    model.generation_config.eos_token_id = 5
    assert genai_config(model, shared=True)["model"]["eos_token_id"] == 5
