"""Maps that a program draws from what ``diffattn export --onnx --maps`` returns, beside those of the model."""

from collections import Counter

import numpy as np
import pytest
import torch
from support.small_exports import ATTENTIONS, decoder, model_of, small_checkpoint, traced_with_maps, without_maps
from support.small_models import ROUNDING, tokens

from diffattn.cli.main import main
from diffattn.errors import ConfigError, UnsupportedError
from diffattn.export import maps as onnx_maps
from diffattn.export import onnx as onnx_export
from diffattn.export.graph import to_graph
from diffattn.export.maps import layers_of
from diffattn.probes.attention_calls import served_by

LENGTH = 11
LAYER = 1
RARE = [("gated", {}), ("diff_gda", {}), ("diff_gda_v2", {}), ("diff_v2", {"lambda_form": "one"})]


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def read(session, ids, pieces, layer):
    """Queries (B, n, S, d), λ (B, S, H) or None, and keys (B, G, S, W) of all tokens, taken piece by piece."""
    names = [value.name for value in session.get_outputs()]
    past = {
        value.name: np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    queries, lam, start = [], [], 0
    for piece in pieces:
        stop = start + piece
        places = np.arange(start, stop)[None].repeat(len(ids), 0)
        given = {"input_ids": ids[:, start:stop], "position_ids": places}
        mask = {"attention_mask": np.ones((len(ids), stop), np.int64)}
        found = dict(zip(names, session.run(names, given | mask | past), strict=True))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        queries.append(found[f"maps.{layer}.query"])
        if (each := found.get(f"maps.{layer}.lambda")) is not None:
            lam.append(np.broadcast_to(each, (len(ids), piece, each.shape[2])))
        start = stop
    return (
        np.concatenate(queries, 2),
        np.concatenate(lam, 1) if lam else None,
        past[f"past_key_values.{layer}.key"],
    )


def drawn(queries, keys, config):
    """Maps (B, n, S, S) of all query heads, in numpy alone."""
    n, d = queries.shape[1], queries.shape[3]
    keys = keys.repeat(n // keys.shape[1], 1)
    if keys.shape[3] == 2 * d:
        noise = np.arange(n) % (config.signals_per_noise + 1) == config.signals_per_noise
        keys = np.where(noise[None, :, None, None], keys[..., d:], keys[..., :d])
    scores = queries @ keys.swapaxes(2, 3) / np.sqrt(d)
    return softmax(np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf))


def models_maps(model, ids, layer):
    """map_pos, map_neg and λ of the layer's one call, by the library's own reading."""
    found = []

    def serve(call):
        if call.layer == layer:
            rows = range(LENGTH)
            found.append((call.maps(rows), call.lam))

    with torch.no_grad(), served_by(model, serve):
        model(input_ids=torch.from_numpy(ids), use_cache=False)
    return found[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_maps_of_a_graph_are_the_models(attention, tmp_path):
    assert_same_maps(model_of(attention), decoder(traced_with_maps(attention), tmp_path).session)


@pytest.mark.full
@pytest.mark.parametrize(("attention", "options"), RARE, ids=str)
def test_maps_of_rarer_models_are_theirs(attention, options, tmp_path):
    model = model_of(attention, **options)
    assert_same_maps(model, decoder(to_graph(model, maps=[LAYER]), tmp_path).session)


@pytest.mark.full
def test_a_graph_with_maps_is_the_graph_without_them_and_more():
    model = model_of("diff_v2")
    kinds = [Counter(node.op_type for node in graph.graph)
             for graph in (to_graph(model), without_maps(traced_with_maps("diff_v2")))]  # fmt: skip
    assert kinds[0] == kinds[1]


def assert_same_maps(model, session):
    ids = tokens(2, LENGTH).numpy()
    queries, lam, keys = read(session, ids, (8, 1, 1, 1), LAYER)
    (signal, *noise), expected_lam = models_maps(model, ids, LAYER)
    maps = drawn(queries, keys, model.config)
    shared = model.config.signals_per_noise
    if not noise:
        assert lam is None
        np.testing.assert_allclose(maps, signal.numpy(), rtol=0, atol=ROUNDING)
        return
    grouped = maps.reshape(2, -1, shared + 1, LENGTH, LENGTH)
    np.testing.assert_allclose(grouped[:, :, :-1].reshape(signal.shape), signal.numpy(), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(grouped[:, :, -1], noise[0].numpy(), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(lam, expected_lam.numpy(), rtol=0, atol=ROUNDING)
    # The two maps of a head differ, so that one in the other's place is seen.
    assert np.abs(grouped[:, :, 0] - grouped[:, :, -1]).max() > 0.1


def test_layers_are_named_by_number_or_all():
    assert layers_of("2,0,2", 3) == (0, 2)
    for text in ("first", "1,", "", "0.5"):
        with pytest.raises(ConfigError, match="wanted numbers of layers with commas between them, or all"):
            layers_of(text, 3)


@pytest.mark.parametrize(
    ("options", "layers", "cache", "line"),
    [
        ({}, (0, 2), True, r"maps of layer 2; wanted layers 0 to 1, which the model has: change --maps"),
        ({}, (-1,), True, r"maps of layer -1; wanted layers 0 to 1"),
        ({}, (0,), False, r"which returns no keys; wanted a graph with a cache: leave --no-cache out"),
        ({"pairs_share_group": False}, (0,), True, r"have values of their own .* leave --maps out"),
    ],
)
def test_maps_that_cannot_be_had_are_refused_before_tracing(options, layers, cache, line):
    with pytest.raises((ConfigError, UnsupportedError), match=line):
        to_graph(model_of("diff_v2", **options), cache=cache, maps=layers)


def test_reading_maps_leaves_the_model_as_it_was():
    model = model_of("diff_v1", 1)
    model.set_attn_implementation("sdpa")
    attention = model.model.layers[0].self_attn
    before = set(vars(attention))
    with onnx_maps.read_maps(model, [0]) as read, torch.no_grad():
        model(tokens(2, 5))
    assert set(vars(attention)) == before
    assert [tuple(each.shape) for each in read] == [(2, 12, 5, 8), (2, 1, 6)]


def test_the_verb_passes_layers_on_and_names_them_in_its_result(tmp_path, capsys, monkeypatch):
    folder = small_checkpoint(tmp_path / "checkpoint")
    asked = {}

    def traced(model, **options):
        asked.update(options)
        raise ConfigError("stopped", "what was asked for", "look at it")

    monkeypatch.setattr(onnx_export, "to_graph", traced)
    assert main(["export", str(folder), "--onnx", "--maps", "all"]) == 2
    assert asked["maps"] == (0,)
    capsys.readouterr()
    assert main(["export", str(folder), "--onnx", "--maps", "first"]) == 2
    assert "maps is 'first'; wanted numbers of layers" in capsys.readouterr().err
