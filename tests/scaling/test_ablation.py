"""The ablation: its arms train as what they say, and the table compares each with what it changes."""

import json
from pathlib import Path

import pytest
from support.small_comparison import write_text
from support.small_ladder import small

from diffattn.cli.main import main
from diffattn.errors import ConfigError, DataError
from diffattn.intervals import paired_difference
from diffattn.model.pairing import build_pair
from diffattn.plan.shape import ModelShape
from diffattn.report.ablation_table import ablation_rows, write_ablation_png
from diffattn.results.ladder import LadderRow
from diffattn.scaling.ablation import ablation
from diffattn.scaling.arms import ARMS
from diffattn.scaling.ladder import run_ladder
from diffattn.variants import VARIANTS

SHAPE = ModelShape(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=56, vocab_size=300)


def row(arm: str, seed: int, loss: float, **changes) -> LadderRow:
    facts = {"parameters": 1000, "non_embedding_parameters": 700, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
             "intermediate_size": 56, "tokens": 64, "context": 16, "needles": 0.0, "vocab_size": 300, "batch_size": 2,
             "match": "parameters", "learning_rate": 1e-3, "dtype": "float32", "model_flops_per_token": 1,
             "data_digest": "d", "bits_per_byte": 1.0, "train_tokens_per_second": 1.0}  # fmt: skip
    return LadderRow(arm=arm, seed=seed, val_loss=loss, **facts | changes)


def test_every_arm_changes_one_thing_of_its_base() -> None:
    plain = {name: ARMS[name].config(SHAPE, "parameters").to_dict() for name in VARIANTS}
    for name, arm in ARMS.items():
        config = arm.config(SHAPE, "parameters").to_dict()
        assert arm.base is None or arm.base in ARMS
        if name in VARIANTS:
            assert config == plain[name]
            continue
        assert name.startswith(f"{arm.attention}+")
        assert arm.base == arm.attention
        changed = {key for key in config if config[key] != plain[arm.attention][key]}
        if arm.wide_heads:
            assert changed == {"num_attention_heads", "num_key_value_heads", "head_dim"}
            assert config["num_attention_heads"] * config["head_dim"] == SHAPE.hidden_size
            assert config["head_dim"] == 2 * SHAPE.head_dim
        else:
            # Without W_λ the feed-forward network is as wide as the parameters allow.
            assert changed - {"intermediate_size"} == set(arm.fields)
    assert len({json.dumps(arm.config(SHAPE, "parameters").to_dict(), sort_keys=True) for arm in ARMS.values()}) == len(
        ARMS
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_starts_from_the_ladders_softmax_model(name: str) -> None:
    twin = build_pair(SHAPE, "softmax", seed=3).model.state_dict()
    model = ARMS[name].build(SHAPE, seed=3, match="parameters").model
    ours = model.state_dict()
    for part in ("embed_tokens.weight", "layers.1.self_attn.k_proj.weight", "layers.1.self_attn.o_proj.weight"):
        assert (ours[f"model.{part}"] == twin[f"model.{part}"]).all()
    wanted = sum(
        tensor.numel() for tensor in {id(t): t for t in build_pair(SHAPE, "softmax").model.parameters()}.values()
    )
    assert model.num_parameters() == pytest.approx(wanted, rel=0.02)


def test_an_ablation_is_trained_as_one_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    arms = ["softmax", "gated", "diff_v1", "diff_v1+no_norm", "diff_v2", "diff_v2+other_groups"]
    out = tmp_path / "out"
    arguments = [
        *f"eval ablation --size 7k --tokens 64 --seeds 2 --batch-size 2 --vocab-size 300 --context 16 --dtype float32 "
        f"--text {tmp_path / 'text'} --out {out} --png {tmp_path / 'chart.png'} --json --arms".split(),
        *arms,
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.err.count(": training ") == 2 * len(arms)
    assert list(result["variants"]) == [name for name in ARMS if name in arms]
    assert {name: pair["baseline"] for name, pair in result["pairs"].items()} == {
        "gated": "softmax",
        "diff_v1": "softmax",
        "diff_v1+no_norm": "diff_v1",
        "diff_v2": "softmax",
        "diff_v2+other_groups": "diff_v2",
    }
    losses = {name: variant["val_loss"] for name, variant in result["variants"].items()}
    for name, pair in result["pairs"].items():
        assert pair["val_loss_difference"] == paired_difference(losses[name], losses[pair["baseline"]]).to_json()
    assert len({value for each in losses.values() for value in each}) == 2 * len(arms)
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    # What is there is not trained again.
    ladder = small(tmp_path, sizes=("7k",), tokens="64", variants=tuple(arms))
    again: list = []
    run_ladder(ladder, out=out, on_progress=again.append)
    assert not again


def test_the_table_says_what_is_seen() -> None:
    rows = [row("softmax", seed, 3.0 + seed) for seed in range(3)]
    rows += [row("diff_v1", seed, 2.9 + seed + 0.001 * seed) for seed in range(3)]
    rows += [row("diff_v1+no_norm", seed, 3.5 + seed) for seed in range(2)]
    rows += [row("gated", seed, 3.0 + 0.9 * seed) for seed in range(3)]
    rows += [row("diff_v2+no_lambda", 0, 3.0)]
    result = ablation(rows)
    table = {line[0]: line for line in ablation_rows(result)[1:]}
    assert list(table) == ["softmax", "gated", "diff_v1", "diff_v1+no_norm", "diff_v2+no_lambda"]
    assert [line[-1] for line in table.values()] == ["", "no difference seen", "better", "worse", ""]
    assert table["diff_v1"][3:5] == ["softmax", "−0.0990"]
    # Two seeds of three: the pairs alone count.
    assert result.pairs["diff_v1+no_norm"].seeds == [0, 1]
    assert result.variants["diff_v1+no_norm"].val_loss == [3.5, 4.5, None]
    # Its base was not trained.
    assert table["diff_v2+no_lambda"][3] == "diff_v2"
    assert "diff_v2+no_lambda" not in result.pairs


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows given"),
        ([row("softmax", 0, 3.0), row("diff_v1", 0, 3.0, hidden_size=64)], "rows have hidden_size 32, 64; wanted one"),
        ([row("mamba", 0, 3.0)], "attention 'mamba'; wanted one of softmax"),
    ],
)
def test_rows_that_cannot_be_compared_are_one_line(rows: list, words: str) -> None:
    with pytest.raises(DataError, match=words):
        ablation(rows)


def test_heads_that_cannot_be_halved() -> None:
    odd = ModelShape(hidden_size=48, num_layers=2, num_heads=6, num_kv_heads=3, intermediate_size=56, vocab_size=300)
    with pytest.raises(ConfigError, match="num_kv_heads=3 given; wanted both even"):
        ARMS["softmax+wide_heads"].shape(odd)


def test_the_chart_names_what_each_arm_is_compared_with(tmp_path: Path) -> None:
    rows = [row(name, seed, 3.0 + 0.1 * seed + 0.01 * place) for place, name in enumerate(ARMS) for seed in range(3)]
    write_ablation_png(ablation(rows), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 20_000
