"""Every study through one front: models of one and of several runs, their intervals and differences."""

import json
import math
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.needle_model import TEXT, haystack, reader

from diffattn.cli.main import main
from diffattn.errors import CheckpointError, ConfigError, DataError
from diffattn.intervals import interval, paired_difference
from diffattn.probes.harness import StandardOptions
from diffattn.probes.icl import IclOptions
from diffattn.probes.long_context import LongContextOptions
from diffattn.probes.low_bit import LowBitOptions
from diffattn.probes.noise import NoiseOptions
from diffattn.probes.options import EvaluateOptions
from diffattn.probes.outliers import OutlierOptions
from diffattn.probes.registry import OURS
from diffattn.probes.retrieval import RetrievalOptions
from diffattn.probes.run import evaluate, parse_models
from diffattn.report.study_chart import study_rows, write_study_png
from diffattn.results.study import ModelPoint

SMALL = {
    "retrieval": RetrievalOptions(lengths=(260,), depths=(0.0, 1.0), tasks=((1, 1), (2, 2)), samples=2),
    "noise": NoiseOptions(length=260, depths=(0.0, 0.5), samples=3),
    "noise_by_head": NoiseOptions(length=260, depths=(0.0, 0.5), samples=3),
    "icl": IclOptions(shots=(2, 4), queries=3, permutations=2, labels=3),
    "outliers": OutlierOptions(tokens=600, context=100, batch_size=2),
    "low_bit": LowBitOptions(bits=(16, 4), context=100, samples=3),
    "long_context": LongContextOptions(length=100, samples=3, chunk=32),
    "standard": StandardOptions(limit=3),
}
POINTS = {
    "retrieval": 4,
    "noise": 4,
    "noise_by_head": 72,
    "icl": 4,
    "outliers": 12,
    "low_bit": 4,
    "long_context": 8,
    "standard": 3,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two runs of V1, one of softmax and a Llama, beside each a tokenizer; and a text of which a half is held out."""
    root, tokenizer = tmp_path_factory.mktemp("models"), haystack().tokenizer
    made = {}
    for name, attention in (("v1a", "diff_v1"), ("v1b", "diff_v1"), ("soft", "softmax"), ("llama", "llama")):
        model = reader(attention)
        if name == "v1b":
            for parameter in model.parameters():
                parameter.data *= 1.05
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        made[name] = str(root / name)
    (root / "text.txt").write_text(f"{TEXT}\n<|endoftext|>\n{TEXT} The end.\n", encoding="utf-8")
    return made | {"text": str(root / "text.txt")}


def text_of(folders, **more) -> EvaluateOptions:
    return EvaluateOptions(text=folders["text"], **more)


@pytest.mark.parametrize("study", OURS)
def test_a_study_of_a_run_and_of_another_model(study, folders):
    seen = []
    result = evaluate(
        study, [folders["soft"], f"llama={folders['llama']}"], SMALL[study], text_of(folders),
        on_progress=lambda *progress: seen.append(progress),
    )  # fmt: skip
    assert list(result.models) == ["soft", "llama"]
    assert len(result.points) == POINTS[study]
    assert {name for name, *_ in seen} == {"soft", "llama"}
    assert all(0 < done <= all_ for _, done, all_ in seen)
    for point in result.points:
        # Llama has two layers of three, and six heads of twelve.
        both = study != "noise_by_head" or (point.by < 2 and point.x < 6)
        assert list(point.models) == (["soft", "llama"] if both else ["soft"])
        for entry in point.models.values():
            assert math.isfinite(entry.mean)
            if entry.low is not None:
                assert entry.low <= entry.mean <= entry.high
        if both:
            assert point.models["llama"].difference.mean == pytest.approx(
                point.models["llama"].mean - point.models["soft"].mean, abs=1e-9
            )
    assert json.loads(json.dumps(result.to_json())) == result.to_json()


def test_of_several_runs_each_is_one_value(folders):
    options = SMALL["low_bit"]
    runs = [evaluate("low_bit", [folders[name]], options, text_of(folders)).points for name in ("v1a", "v1b")]
    pair = f"v1={folders['v1a']},{folders['v1b']}"
    both = evaluate("low_bit", [pair, folders["soft"]], options, text_of(folders))
    for first, second, point in zip(*runs, both.points, strict=True):
        means = [first.models["v1a"].mean, second.models["v1b"].mean]
        assert point.models["v1"] == ModelPoint(**vars(interval(means)), values=2, difference=None, is_first=True)
        # Two runs and one cannot be paired.
        assert point.models["soft"].difference is None
        assert point.models["soft"].values == 3
    turned = f"b={folders['v1b']},{folders['v1a']}"
    same = evaluate("low_bit", [pair, turned], options, text_of(folders))
    for point, first, second in zip(same.points, *runs, strict=True):
        a, b = first.models["v1a"].mean, second.models["v1b"].mean
        assert point.models["b"].difference == paired_difference([b, a], [a, b])


def test_another_rotary_base_reads_beyond_the_models_positions(folders):
    options = LongContextOptions(length=9000, samples=1)
    with pytest.raises(ConfigError, match="wanted at most 8192, the model's max_position_embeddings"):
        evaluate("long_context", [folders["soft"]], options, text_of(folders))
    options = LongContextOptions(length=120, samples=1, rope_base=1e6)
    extended = evaluate("long_context", [folders["soft"]], options, text_of(folders)).points[-1]
    plain = evaluate("long_context", [folders["soft"]], LongContextOptions(length=120, samples=1), text_of(folders))
    assert extended.models["soft"].mean != plain.points[-1].models["soft"].mean


def test_a_length_left_open_fits_all_models(folders, tmp_path):
    shutil.copytree(folders["soft"], tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 90}))
    models = [folders["soft"], str(tmp_path / "short")]
    result = evaluate("low_bit", models, LowBitOptions(bits=(16,), samples=2), text_of(folders))
    assert result.options["context"] == 90
    assert all(entry.mean == result.points[0].models["soft"].mean
               for entry in result.points[0].models.values())  # fmt: skip
    # Refused before the text is read.
    for study, options in (("noise", NoiseOptions(length=91)), ("retrieval", RetrievalOptions(lengths=(80, 91)))):
        with pytest.raises(ConfigError, match="a length of 91 tokens given; wanted at most 90"):
            evaluate(study, models, options, EvaluateOptions(text="absent"))


@pytest.mark.parametrize(
    ("options", "positions", "name", "wanted"),
    [
        (RetrievalOptions(), 256, "lengths", (256,)),
        (RetrievalOptions(lengths=(64, 128)), 256, "lengths", (64, 128)),
        (NoiseOptions(), None, "length", 1024),
        (OutlierOptions(), 2048, "context", 1024),
        (LongContextOptions(), 2048, "length", 2048),
        (LongContextOptions(), 8192, "length", 4096),
        (LongContextOptions(rope_base=1e6), 2048, "length", 4096),
    ],
)
def test_lengths_by_default(options, positions, name, wanted):
    assert getattr(options.fitted(positions), name) == wanted


def test_table_and_chart(folders, tmp_path):
    result = evaluate("noise", [folders["soft"], folders["v1a"]], SMALL["noise"], text_of(folders))
    header, *rows = study_rows(result.table)
    assert header == ["noise", "depth of the needle", "soft", "v1a", "v1a − soft"]
    assert len(rows) == len(result.points) == 12
    first = rows[0]
    assert first[:2] == ["answer", "0"]
    assert " ±" in first[2]
    assert " ±" in first[4]
    assert all(("no difference seen" in row[4]) == (row[4] != "–" and _crosses_zero(row[4])) for row in rows)
    # Softmax has one map, so there is nothing to compare the others with.
    assert [(row[2], row[4]) for row in rows if row[0].startswith("map_")] == [("–", "–")] * 8
    write_study_png(result.table, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")


def _crosses_zero(text: str) -> bool:
    mean, half = text.removesuffix(", no difference seen").split(" ±")
    return abs(float(mean)) <= float(half)


@pytest.mark.parametrize("study", OURS)
def test_the_verb_prints_one_object_and_the_table(study, folders, tmp_path, capsys):
    options = {
        "retrieval": ["--lengths", "260", "--depths", "0.5", "--tasks", "1", "1", "--samples", "1"],
        "noise": ["--length", "260", "--depths", "0.5", "--samples", "1"],
        "noise_by_head": ["--length", "260", "--depths", "0.5", "--samples", "1"],
        "icl": ["--shots", "2", "--queries", "2", "--permutations", "1"],
        "outliers": ["--tokens", "200", "--context", "100"],
        "low_bit": ["--bits", "8", "--context", "100", "--samples", "2"],
        "long_context": ["--length", "50", "--samples", "2"],
        "standard": ["--tasks", "text_likelihood", "--limit", "2"],
    }[study]
    chart = tmp_path / "new" / "chart.png"
    command = ["eval", study, folders["v1a"], "--text", folders["text"], "--json", "--png", str(chart), *options]
    assert main(command) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["study"] == study
    assert result["command"].startswith("diffattn")
    assert result["points"][0]["panel"][:8] in err.replace("\n", " ")
    assert chart.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "models are none"),
        (["a", "b/a"], "models are a, a; wanted at least one, each of a name of its own"),
        (["=a"], "model '=a' given"),
        (["a="], "model 'a=' given"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(words, line):
    with pytest.raises(ConfigError, match=line):
        parse_models(words)


def test_the_model_of_a_run_has_its_runs_name():
    assert [model.name for model in parse_models(["runs/v1-seed0/model", "x=runs/b"])] == ["v1-seed0", "x"]


def test_a_folder_that_is_none_is_found_before_the_first_is_read(folders, capsys):
    seen = []
    with pytest.raises(CheckpointError):
        evaluate("noise", [folders["soft"], "absent"], SMALL["noise"], text_of(folders), on_progress=seen.append)
    assert not seen
    assert main(["eval", "noise", "absent"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    with pytest.raises(ConfigError, match="study is 'poetry'; wanted one of retrieval, noise"):
        evaluate("poetry", [folders["soft"]])


@pytest.mark.parametrize(
    ("study", "options", "words"),
    [
        (
            "low_bit",
            LowBitOptions(context=100, samples=900),
            "the held-out text has .* blocks of 100 tokens; wanted 900",
        ),
        ("outliers", OutlierOptions(context=100), "wanted 400000: give more text"),
        ("outliers", OutlierOptions(context=9000), "wanted at most 8192"),
    ],
)
def test_what_cannot_be_is_refused(study, options, words, folders):
    with pytest.raises((ConfigError, DataError), match=words):
        evaluate(study, [folders["soft"]], options, text_of(folders))


def test_what_is_kept_is_not_measured_again(folders, tmp_path, monkeypatch):
    def measure(options=SMALL["low_bit"]):
        seen = []
        result = evaluate(
            "low_bit", [f"v1={folders['v1a']},{folders['v1b']}", folders["soft"]], options,
            text_of(folders, keep=tmp_path / "kept"), on_progress=lambda name, *_: seen.append(name),
        )  # fmt: skip
        return (result.models, result.points), seen

    first, seen = measure()
    assert set(seen) == {"v1", "soft"}
    of_three = len(seen)
    kept = sorted((tmp_path / "kept").glob("low_bit-*.json"))
    assert len(kept) == 3
    again, seen = measure()
    assert (again, seen) == (first, [])
    # One run is gone, one file is half of itself: those two are measured.
    kept[0].unlink()
    kept[1].write_text(kept[1].read_text()[:100])
    again, seen = measure()
    assert again == first
    assert len(seen) * 3 == of_three * 2
    # A number that somebody changed is not believed.
    whole = kept[1].read_text()
    number = str(json.loads(whole)["points"][0]["values"][0])
    kept[1].write_text(whole.replace(number, "0.5", 1))
    with pytest.raises(CheckpointError, match=f"{kept[1].name} was changed after it was written.*measured again"):
        measure()
    kept[1].write_text(whole)
    # Another question has answers of its own.
    _, seen = measure(LowBitOptions(bits=(16,), context=100, samples=3))
    assert seen


def test_weights_of_one_size_and_time_are_told_apart(folders, tmp_path):
    def loss(folder):
        result = evaluate(
            "low_bit", [str(folder)], LowBitOptions(bits=(16,), context=100, samples=1),
            text_of(folders, keep=tmp_path / "kept"),
        )  # fmt: skip
        return result.points[0].models[folder.name].mean

    first = shutil.copytree(folders["soft"], tmp_path / "first")
    other = shutil.copytree(first, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    for folder in (first, other):
        os.utime(folder / "model.safetensors", (1e9, 1e9))
    assert (first / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    assert loss(first) != loss(other)
    # A folder that was moved is known.
    again = shutil.copytree(first, tmp_path / "again")
    assert loss(again) == loss(first)
    assert len(list((tmp_path / "kept").glob("low_bit-*.json"))) == 2


def test_cells_of_a_run_that_was_cut_are_kept(folders, tmp_path):
    def cut(name, done, all_):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("retrieval", [folders["soft"]], SMALL["retrieval"], text_of(folders, keep=tmp_path), on_progress=cut)
    (rows,) = tmp_path.glob("retrieval-*.jsonl")
    assert len(rows.read_text().splitlines()) == 1
    # A line that was cut is asked again, one that was changed is named.
    whole = rows.read_text()
    rows.write_text(whole.replace("false", "true", 1) if "false" in whole else whole.replace("true", "false", 1))
    seen = []

    def again():
        evaluate(
            "retrieval", [folders["soft"]], SMALL["retrieval"], text_of(folders, keep=tmp_path),
            on_progress=lambda name, done, all_: seen.append((done, all_)),
        )  # fmt: skip

    with pytest.raises(CheckpointError, match=f"{rows.name} line 1 was changed after it was written"):
        again()
    rows.write_text(whole + '{"length": 2')
    again()
    assert seen[-1] == (6, 6)


def test_depth_and_length_are_a_map(folders, tmp_path):
    options = RetrievalOptions(lengths=(260, 300), depths=(0.0, 1.0), tasks=((1, 1),), samples=1)
    result = evaluate("retrieval", [folders["soft"], folders["v1a"]], options, text_of(folders))
    assert [(point.panel, point.by, point.x) for point in result.points] == [
        ("1 needle, 1 asked for", length, depth) for length in (260, 300) for depth in (0.0, 1.0)
    ]
    header, first, *_ = study_rows(result.table)
    assert header[:5] == ["retrieval", "tokens", "depth of the first needle", "soft", "v1a"]
    assert first[:3] == ["1 needle, 1 asked for", "260", "0"]
    write_study_png(result.table, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
