import numpy as np
import onnx_ir
import pytest
from support.small_exports import copy, decoder, traced

from diffattn.errors import CheckpointError, ConfigError
from diffattn.export import graph as onnx_graph
from diffattn.export.run import OnnxDecoder, _choose

IDS = np.array([[3, 5, 7], [2, 11, 13]])


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return decoder(traced("softmax", False), tmp_path_factory.mktemp("model"))


def test_draws_have_the_probabilities_that_are_asked_for():
    logits = np.log(np.array([0.5, 0.1, 0.25, 0.15], np.float32))
    drawn = _choose(np.tile(logits, (40_000, 1)), 1.0, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.5, 0.1, 0.25, 0.15], atol=0.01)
    # The likeliest two hold 0.75, so the third is needed for 0.8.
    drawn = _choose(np.tile(logits, (40_000, 1)), 1.0, 0.8, np.random.default_rng(0))
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=4) / len(drawn), np.array([0.5, 0, 0.25, 0.15]) / 0.9, atol=0.01
    )
    drawn = _choose(np.tile(logits, (40_000, 1)), 0.5, 1.0, np.random.default_rng(0))
    squares = np.array([0.5, 0.1, 0.25, 0.15]) ** 2
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), squares / squares.sum(), atol=0.01)


def test_a_seed_gives_its_text(session):
    first, again, other = (session.generate(IDS, 17, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert session.generate(IDS, 17, temperature=1.0, top_p=1e-9).tolist() == session.generate(IDS, 17).tolist()


def test_a_row_ends_at_a_stop_token_and_the_text_when_all_rows_have(session):
    free = session.generate(IDS, 11)[:, 3:]
    stop = int(free[0, 4])
    stopped = session.generate(IDS, 11, stop=[stop])[:, 3:]
    for row, expected in zip(stopped, free, strict=True):
        end = expected.tolist().index(stop) + 1 if stop in expected else len(row)
        assert row[:end].tolist() == expected[:end].tolist()
        assert set(row[end:]) <= {stop}
    assert session.generate(IDS[:1], 11, stop=[int(free[0, 0])]).shape == (1, 4)


def test_what_cannot_be_run_is_one_line(session, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\.onnx"):
        OnnxDecoder(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="cannot be loaded by onnxruntime") as error:
        OnnxDecoder(tmp_path)
    assert "\n" not in str(error.value)
    other = copy(traced("softmax", False))
    next(value for value in other.graph.inputs if value.name == "input_ids").name = "tokens"
    onnx_graph.save(other, tmp_path)
    with pytest.raises(CheckpointError, match="no decoder"):
        OnnxDecoder(tmp_path)
    with pytest.raises(ConfigError, match="threads is 0"):
        OnnxDecoder(tmp_path, threads=0)
    with pytest.raises(ConfigError, match="attention_mask is"):
        session.logits(IDS, np.ones((2, 4), np.int64))
    with pytest.raises(ConfigError, match="temperature is -1"):
        session.generate(IDS, 1, temperature=-1)


def test_the_graph_gives_the_same_without_onnxruntimes_rewriting(session, tmp_path):
    onnx_graph.save(traced("softmax", False), tmp_path)
    plain = OnnxDecoder(tmp_path, threads=1, optimize=False)
    np.testing.assert_allclose(plain.logits(IDS)[0], session.logits(IDS)[0], rtol=0, atol=1e-5)


def test_a_model_of_another_program_says_what_it_is():
    assert onnx_ir.to_proto(traced("softmax", False)).producer_name == "diffattn"
