"""Two models side by side: what is compared, what the sentences say, and the plan along an axis and turned around."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from diffattn.errors import ConfigError
from diffattn.plan.answer import backends_of, plan
from diffattn.plan.cost import count_parameters
from diffattn.plan.memory import inference_memory, training_memory
from diffattn.plan.named_model import named, parse_model
from diffattn.plan.result import Plan
from diffattn.plan.rule import shape_about
from diffattn.plan.search import fits, parse_size, parse_sweep, sweep
from diffattn.plan.setting import Setting, parse_tokens, precision_of
from diffattn.plan.shape import ModelShape
from diffattn.plan.text import backend_table, table
from diffattn.variants import VARIANTS

PRESET = ModelShape.preset("300K")
SHORT = Setting(context=64)
CONFIG = {"model_type": "diff_transformer", "attention": "diff_v1", "hidden_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 88,
          "vocab_size": 300}  # fmt: skip


def test_a_model_is_a_preset_a_file_a_checkpoint_or_a_count(tmp_path: Path) -> None:
    assert parse_model("diff_v1:300K").shape == PRESET
    assert parse_model("softmax:11B").shape == shape_about(11e9)
    assert parse_model("softmax:about-6.8B").shape == shape_about(6.8e9) != parse_model("softmax:6.8B").shape
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    own = parse_model(str(tmp_path))
    assert (own.attention, own.shape.num_heads, own.shape.head_dim) == ("diff_v1", 4, 16)
    assert parse_model(f"softmax:{tmp_path}").shape == own.shape
    assert parse_model(f"softmax:{tmp_path / 'config.json'}").attention == "softmax"
    file = tmp_path / "mine.toml"
    file.write_text("hidden_size = 64\nnum_layers = 2\nnum_heads = 4\nintermediate_size = 88\nvocab_size = 300\n")
    assert parse_model(f"diff_v2:{file}").shape.name == "mine"


def test_what_a_checkpoint_has_beside_its_shape_is_counted_and_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"attention": "softmax", "attention_bias": True}))
    result = plan(str(tmp_path), "softmax:300K", SHORT)
    # Biases of 4 heads of queries and 2 of keys and of values, 32 wide, in two layers.
    found = result.model.estimate
    assert found.parameters.attention == 2 * (2 * 4 * 32 * 64 + 2 * 2 * 32 * 64) + 512
    assert found.parameters.total == found.parameters.attention + 300 * 64 + 2 * 3 * 64 * 88 + 5 * 64
    assert found.disk["fp32"].bytes == 4 * found.parameters.total
    assert result.model.left_out == {}
    named, beside = result.notes
    assert named == f"{tmp_path.name} is the softmax model of {tmp_path}."
    assert beside.startswith(f"Beside its shape {tmp_path.name} has biases (512 parameters), 0.50% of it")
    assert plan("softmax:300K", "softmax:300K", SHORT).notes == []


def test_layers_that_see_a_window_are_said(tmp_path: Path) -> None:
    shape = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 1000}
    sizes = {key: value for key, value in CONFIG.items() if key != "attention"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | shape | {"model_type": "gemma2"}))
    notes = plan(str(tmp_path), setting=SHORT).notes
    said = f"In 1 of its 2 layers a token of {tmp_path.name} sees the last 1,000 tokens alone, and FLOPs and the cache"
    assert any(note.startswith(said) for note in notes)


def test_a_model_alone_is_planned_alone() -> None:
    result = plan("softmax:300K", setting=Setting(context=64, batch=2, ranks=2, shard="full"))
    assert result.against is None
    assert {(row.against, row.ratio) for row in result.ratios} == {(None, None)}
    assert {row.model for row in result.backends} == {"softmax:300K"}
    assert not any(word in " ".join(result.sentences) for word in ("×)", "against", "11B", "None"))
    assert {len(row) for row in table(result)} == {2}
    rows = sweep("batch=1:2", "softmax:300K", setting=SHORT)
    assert [(row.value, row.model) for row in rows] == [(1, "softmax:300K"), (2, "softmax:300K")]
    assert plan(against="softmax:300K", setting=SHORT).model.name == "diff_v1:6.8B"
    json.dumps(result.to_json(), allow_nan=False)


def test_two_models_of_one_name_are_called_as_they_were_written(tmp_path: Path) -> None:
    for parent, width in (("a", 64), ("b", 128)):
        folder = tmp_path / parent / "same"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": width}))
    first, second = (str(tmp_path / parent / "same") for parent in "ab")
    result = plan(first, second, SHORT)
    assert [each.name for each in result.models] == [first, second]


def test_the_same_model_twice_where_it_does_not_fit() -> None:
    assert "neither" in plan("softmax:13.1B", "softmax:13.1B").sentences[2]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("DIFF_V1:6.8B", "diff_v1:6.8B"),
        (" diff-v1 : 6.8b ", "diff_v1:6.8B"),
        ("V2:3m", "diff_v2:3M"),
        ("soft:6,8B", "softmax:6.8B"),
        ("softmax:6800M", "softmax:6.8B"),
        ("softmax:6_800_000_000", "softmax:6.8B"),
        ("softmax:7B", "softmax:7B"),
    ],
)
def test_names_and_sizes_as_people_write_them(text: str, name: str) -> None:
    model = parse_model(text)
    assert model.name == name
    if text.strip() != name:
        assert plan(text, setting=SHORT).notes == [f"{text.strip()!r} is planned as {name}."]


def test_a_size_alone_is_v1_and_the_second_one_softmax() -> None:
    result = plan("6.8b", "3B", SHORT)
    assert [each.name for each in result.models] == ["diff_v1:6.8B", "softmax:3B"]
    assert result.notes == ["'6.8b' is planned as diff_v1:6.8B.", "'3B' is planned as softmax:3B."]


def test_v2_is_matched_and_the_others_are_built_as_they_are() -> None:
    for group in (None, 2):
        shape = parse_model("softmax:30M", group=group).shape
        wanted = count_parameters(shape, "softmax").total
        for attention, variant in VARIANTS.items():
            if variant.shares_noise and group is None:
                continue
            model = parse_model(f"{attention}:30M", group=group)
            assert abs(count_parameters(model.built, attention).total / wanted - 1) <= 0.005
            assert (model.built == shape) == (attention in ("softmax", "diff_v1"))


def test_group_is_how_many_query_heads_share_a_key_value_head() -> None:
    model = parse_model("diff_gda:1.4B", group=4)
    assert (model.name, model.shape.num_kv_heads, model.shape.num_heads) == ("diff_gda:1.4B (group 4)", 4, 16)
    assert model.built.intermediate_size > model.shape.intermediate_size
    assert parse_model("gda-v2:1.3B", group=4).shape == shape_about(1.3e9, group=4)
    both = named("diff_gda:1.4B", "1.4B", group=4)
    assert [each.shape for each in both] == [model.shape, model.shape]
    assert both[1].name == "softmax:1.4B (group 4)"
    for text, group, words in (
        ("diff_gda:1.4B", None, "num_kv_heads=16 with num_heads=16 .*--group"),
        ("diff_gda:1.4B", 3, "group is 3 with num_heads=16; wanted a number that divides"),
        ("softmax:1.4B", 0, "group is 0; wanted a number from 1"),
        ("qwen3-0.6B", 2, "group 2 beside the model 'qwen3-0.6B'; wanted the heads that it has: leave out --group"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_model(text, group=group)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("300K", "put one of softmax, diff_v1, diff_v2, diff_gda, diff_gda_v2, gated and a colon"),
        ("dif_v1:300K", "did you mean diff_v1"),
        ("softmax:big", "size 'big'"),
        ("softmax:", "size ''"),
        ("softmax:absent.toml", "check the path"),
        ("softmax:3K", "3000 parameters"),
        ("diff:3M", "diff_v1 and diff_v2 and diff_gda and diff_gda_v2 fit"),
        ("softmax:6,837B", "write 6.837B or 6837B"),
        ("softmax:" + "9" * 400, "size '9999"),
        ("softmax:1e400", "size '1e400'"),
        ("softmax:nan", "size 'nan'"),
        ("softmax:-3B", "size '-3B'"),
        ("", "model ''"),
        ("   ", "model ''"),
        (":", "model ':'"),
        ("x" * 5000, "model 'xxx"),
        ("softmax:\0", "size"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_model(text)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def paper() -> Plan:
    return plan(command="diffattn plan")


def test_rows_hold_both_values_and_their_ratio(paper: Plan) -> None:
    rows = {row.key: row for row in paper.ratios}
    shape, other = ModelShape.preset("6.8B"), shape_about(11e9)
    parameters = (count_parameters(shape, "diff_v1").total, count_parameters(other, "softmax").total)
    training = (training_memory(shape, "diff_v1", Setting()).total, training_memory(other, "softmax", Setting()).total)
    for key, values in (("parameters", parameters), ("training_bytes", training)):
        assert (rows[key].model, rows[key].against) == values
        assert rows[key].ratio == values[0] / values[1]
    assert rows["cache_bytes_per_token"].model == 2 * 32 * 4096 * 2
    assert rows["score_bytes"].ratio is None
    assert not any(key.startswith("rank_") for key in rows)


def test_json_of_a_plan_has_the_names_of_its_fields(paper: Plan) -> None:
    found = paper.to_json()
    assert list(found) == ["model", "against", "ratios", "backends", "setting", "command", "sentences", "notes"]
    for each in (found["model"], found["against"]):
        assert list(each) == ["name", "attention", "shape", "left_out", "estimate"]
        assert each["estimate"]["training"]["intensity"] > each["estimate"]["decoding"]["intensity"] > 0
        assert each["estimate"]["parameters"]["total"] > each["estimate"]["parameters"]["non_embedding"]
    json.dumps(found, allow_nan=False)


def test_parallel_plans_have_rows_for_one_rank() -> None:
    result = plan("diff_v1:300K", "softmax:300K", Setting(context=64, batch=2, ranks=2, shard="full"))
    rows = {row.key: row.model for row in result.ratios}
    assert 0 < rows["rank_training_bytes"] < rows["training_bytes"]


@pytest.mark.parametrize(("attention", "ratio"), [("diff_v1", 1.0), ("diff_v2", 2.0)])
def test_maps_are_doubled_where_they_are_written_and_queries_are_doubled(attention: str, ratio: float) -> None:
    result = plan(f"{attention}:6.8B")
    rows = [row for row in result.backends if row.attention == attention]
    assert tuple(row.backend for row in rows) == backends_of(attention)
    assert {row.backend: row.score_ratio_to_twin for row in rows if row.score_bytes} == {"materialised": ratio}
    assert all(row.cache_ratio_to_twin == 1 for row in rows)
    said = result.sentences[0]
    assert ("doubled in materialised alone" in said) == (ratio == 2)
    assert ("doubled in no backend" in said) == (ratio == 1)
    assert f"holds {ratio:.2f}× the bytes of maps" in said
    assert "its KV cache is the same in every row" in said


def test_sentences_say_what_the_rows_say(paper: Plan) -> None:
    memory, phases, small = paper.sentences
    rows = {row.key: row.ratio for row in paper.ratios}
    inference = rows["prefill_bytes"]
    assert f"{rows['parameters']:.0%} of the parameters" in memory
    assert re.findall(r"\((\d\.\d\d)×\)", memory) == [f"{rows['training_bytes']:.2f}", f"{inference:.2f}"]
    assert "it needs less in training and in inference" in memory
    assert f"{rows['training_bytes']:.2f}× of the memory becomes {inference:.2f}×" in phases
    assert "is better for diff_v1:6.8B at inference" in phases
    assert f"as int4 ({rows['disk_bytes_int4']:.2f}×)" in small
    assert "Raspberry Pi 5 (8 GiB): only diff_v1:6.8B" in small
    for sentence in paper.sentences:
        assert "\n" not in sentence


def test_sentences_of_the_pair_the_other_way_round() -> None:
    memory, phases, small = plan("softmax:11B", "diff_v1:6.8B").sentences
    assert "it needs less in neither" in memory
    assert "twice" not in memory
    assert "is worse for softmax:11B at inference" in phases
    assert "Raspberry Pi 5 (8 GiB): only diff_v1:6.8B" in small


def test_sentences_without_times_or_without_training() -> None:
    result = plan("diff_v2:300K", "softmax:300K", Setting(context=64, machine=None))
    assert "Tokens per second" not in result.sentences[1]
    assert "first token" not in result.sentences[2]
    whole = precision_of("bf16", weights="int8", cache="int8")
    result = plan("diff_v2:300K", "softmax:300K", Setting(context=64, precision=whole))
    assert "not trained" in result.sentences[1]
    assert {row.model for row in result.ratios if row.key.startswith("train")} == {None}
    assert table(result)[3][1:] == ["–", "–", ""]


def test_tables_are_rectangles_of_text(paper: Plan) -> None:
    for rows in (table(paper), backend_table(paper.backends)):
        assert {len(row) for row in rows} == {len(rows[0])}
        assert all(isinstance(cell, str) for row in rows for cell in row)
    assert table(plan("diff_v1:6.8B", "softmax:13.1B"))[1] == ["Parameters", "6.84 B", "13.1 B", "0.52×"]


def test_sizes_and_axes_as_people_write_them() -> None:
    assert [parse_tokens(text) for text in ("1k", "128K", "7", "1_000", "2M")] == [1024, 131072, 7, 1000, 2 << 20]
    assert [parse_size(text) for text in ("8GiB", "8G", "8GB", "0.5 KiB", "3b")] == [
        8 << 30,
        8 << 30,
        8 * 10**9,
        512,
        3,
    ]
    assert [parse_size(text) for text in (8, " 8 gib ", "8,5 GB", "1_000kB", "1.5TiB")] == [
        8,
        8 << 30,
        8_500_000_000,
        10**6,
        3 << 39,
    ]
    assert [parse_tokens(text) for text in ("4K", " 4 k ", "4,096", "1.5k")] == [4096, 4096, 4096, 1536]
    assert parse_sweep(" Context = 1K : 4k ") == parse_sweep("ctx=1k:4k".replace("ctx", "cont"))
    assert parse_sweep("context=1k:128k").values == tuple(1024 << power for power in range(8))
    assert parse_sweep("batch=3:3").values == (3,)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "4.5", "4x", "1e30", "9" * 5000, "4k4"])
def test_bad_contexts_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"batch '.*'; wanted a whole number from 1") as caught:
        parse_tokens(text, "batch")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    ["context", "context=1k", "width=1:2", "context=2k:1k", "batch=0:4", "batch=1:x", "", "context=:", "context=1:2:3",
     "=1:2"],
)  # fmt: skip
def test_bad_sweeps_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="wanted") as caught:
        parse_sweep(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["8 bananas", "", "0", "-1GiB", "0.1B", "GiB", "8", "8000000000", "nan", "inf GiB", "1e400GiB", "9" * 400, " "],
)
def test_bad_sizes_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="such as 8GiB"):
        parse_size(text)


def test_a_sweep_is_the_plan_at_each_value() -> None:
    setting = Setting(context=64, machine="Raspberry Pi 5")
    rows = sweep("batch=1:3", "diff_v1:300K", "softmax:300K", setting)
    assert [(row.value, row.model) for row in rows] == [
        (value, name) for value in (1, 2, 3) for name in ("diff_v1:300K", "softmax:300K")
    ]
    other = plan("diff_v1:300K", "softmax:300K", replace(setting, batch=3)).model.estimate
    assert rows[4].training_bytes == other.training.memory.total
    assert rows[4].decoding_tokens_per_second == other.decoding.tokens_per_second
    assert all(row.fits_training and row.fits_inference for row in rows)


@pytest.mark.parametrize("attention", VARIANTS)
def test_what_fits_is_the_last_that_fits(attention: str) -> None:
    limit, setting = 400 << 20, Setting(context=64, batch=2, precision="fp32")
    model = parse_model(f"{attention}:300K", group=3)
    built = model.built

    def inference(at: Setting) -> int:
        return inference_memory(built, attention, at)

    def training(at: Setting) -> int:
        return training_memory(built, attention, at).total

    rows = fits(limit, model, setting)
    values = {(row.phase, row.what): row.value for row in rows if row.what != "parameters"}
    for phase, need in (("training", training), ("inference", inference)):
        for axis in ("context", "batch"):
            last = values[phase, axis]
            assert need(replace(setting, **{axis: last})) <= limit < need(replace(setting, **{axis: last + 1}))


def test_the_largest_shape_is_one_step_below_too_large() -> None:
    for row in fits("8GiB"):
        if row.what != "parameters":
            continue
        assert row.bytes <= 8 << 30
        widths = [shape_about(row.value * factor).hidden_size for factor in (1, 1.3, 1.6)]
        larger = next(shape_about(row.value * f) for f, w in zip((1, 1.3, 1.6), widths, strict=True) if w > widths[0])
        training = training_memory(larger, row.attention, Setting()).total
        peak = training if row.phase == "training" else inference_memory(larger, row.attention, Setting())
        assert peak > 8 << 30


def test_where_nothing_fits_it_says_so() -> None:
    with pytest.raises(ConfigError, match="wanted more"):
        fits("1MiB")
    rows = fits("8GiB", setting=Setting(precision=precision_of("bf16", weights="int4")))
    assert {row.phase for row in rows} == {"inference"}


def test_the_examples_of_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    of_a_plan, of_a_cluster = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(of_a_plan, "docs/plan.md", "exec"), {})
    assert "of the parameters of softmax:11B" in capsys.readouterr().out
    exec(compile(of_a_cluster, "docs/plan.md", "exec"), {})
    size, hours = capsys.readouterr().out.split()
    assert 10**9 < int(size) < 80 * 2**30
    assert float(hours) > 10_000
