"""Plans on a cluster, against bytes and seconds by hand."""

import json
from typing import Any

import pytest

from diffattn.cli.main import main
from diffattn.plan.cluster.answer import plan_cluster
from diffattn.plan.cluster.links import LINKS, parse_cluster
from diffattn.plan.cluster.traffic import traffic
from diffattn.plan.setting import Setting
from diffattn.plan.shape import ModelShape

# 3 layers of 4·24·24 + 3·64·24 + 2·24 numbers; two embeddings of 104·24 and a norm of 24. All divide by 4 and 8.
SHAPE = ModelShape(
    hidden_size=24, num_layers=3, num_heads=4, head_dim=6, intermediate_size=64, vocab_size=104,
    tie_word_embeddings=False,
)  # fmt: skip
LAYER, ROOT = 4 * 24 * 24 + 3 * 64 * 24 + 2 * 24, 2 * 104 * 24 + 24


def setting(**changes: Any) -> Setting:
    return Setting(**{"context": 16, "batch": 8, "precision": "autocast", "backend": "standard"} | changes)


def test_fsdp_gathers_layers_twice_and_the_rest_once_and_scatters_float32() -> None:
    found = traffic(SHAPE, "softmax", setting(ranks=8, shard="full"), parse_cluster("8xH100"))
    assert found.gathered == 2 * (2 * 3 * LAYER + ROOT) * 7 // 8
    assert found.scattered == 4 * (3 * LAYER + ROOT) * 7 // 8
    assert found.copied == found.tensor == 0
    assert found.seconds == pytest.approx((found.gathered + found.scattered) / 450e9)


def test_copies_sum_all_gradients_and_hosts_only_their_part() -> None:
    copies = traffic(SHAPE, "softmax", setting(ranks=8), parse_cluster("8xH100"))
    assert copies.copied == 2 * 4 * (3 * LAYER + ROOT) * 7 // 8
    assert copies.gathered == copies.scattered == 0
    hosts = traffic(SHAPE, "softmax", setting(ranks=8, shard="hybrid", per_host=4), parse_cluster("8xH100", per_host=4))
    assert hosts.copied == 2 * 4 * (3 * LAYER + ROOT) // 4 // 2
    assert hosts.gathered == 2 * (2 * 3 * LAYER + ROOT) * 3 // 4


def test_a_tensor_group_sums_twice_a_layer_in_each_pass() -> None:
    tokens = 8 * 16
    for checkpointing, sums in ((False, 4), (True, 6)):
        found = traffic(SHAPE, "softmax", setting(tp=2, checkpointing=checkpointing), parse_cluster("2xH100"))
        # Sums over two ranks move what they are long, the logits half; the embedding is summed once.
        assert found.tensor == 2 * (3 * sums + 1) * 24 * tokens + 2 * 104 * tokens // 2
        assert found.tensor_seconds == found.seconds - (found.gathered + found.scattered) / 450e9


def test_seconds_are_those_of_the_narrowest_link() -> None:
    near = parse_cluster("8xH100")
    assert near.seconds(8e9, 8, 1) == pytest.approx(7e9 / 450e9)
    far = parse_cluster("16xH100")
    # Half of it comes into each host, over eight links of 50 GB/s.
    assert far.seconds(64e9, 16, 1) == pytest.approx(max(32e9 / 400e9, 60e9 / 500e9))
    # One rank in each host: all of it over one link.
    assert far.seconds(64e9, 2, 8) == pytest.approx(32e9 / 50e9)
    assert far.seconds(64e9, 1, 1) == 0


def test_the_paper_recipes_on_a_trillion_tokens() -> None:
    plan = plan_cluster("64xH100")
    assert [model.name for model in plan.models] == ["diff_v1:3B", "softmax:3B", "diff_v1:13.1B", "softmax:13.1B"]
    for model in plan.models:
        best = model.best
        assert best.fits
        assert best.memory.total <= 0.9 * 80 * 2**30
        assert best.least_seconds == max(best.compute_seconds, best.traffic_seconds)
        assert best.least_seconds <= best.assumed_seconds
        assert model.tokens_per_second == pytest.approx(model.step_tokens / best.assumed_seconds)
        assert model.gpu_hours == pytest.approx(1e12 / model.tokens_per_second / 3600 * 64)
        # 6·N·T FLOPs at the assumed rate are a bound from below.
        parameters = 3.0e9 if "3B" in model.name and "13" not in model.name else 12.5e9
        assert model.gpu_hours > 6 * parameters * 1e12 / (0.4 * 989e12) / 3600
        assert model.gpu_hours < 3 * 6 * parameters * 1e12 / (0.4 * 989e12) / 3600
        assert 0.2 < best.mfu < 0.4
    assert [model.context for model in plan.models] == [4096, 4096, 2048, 2048]
    json.dumps(plan.to_json(), allow_nan=False)


def test_the_best_layout_is_the_fastest_that_fits() -> None:
    layouts = plan_cluster("16xH100", ["softmax:13.1B"]).models[0].layouts
    fitting = [layout for layout in layouts if layout.fits]
    assert layouts[: len(fitting)] == fitting
    assert not all(layout.fits for layout in layouts)
    speeds = [layout.passes * layout.sequences / layout.tp / layout.assumed_seconds for layout in fitting]
    assert speeds == sorted(speeds, reverse=True)


def test_more_machines_and_a_faster_link_take_no_longer() -> None:
    one, two = (plan_cluster(cluster, ["softmax:3B"]).models[0].hours for cluster in ("16xH100", "32xH100"))
    assert two < one
    slow = parse_cluster("32xH100", between="10Gb/s")
    assert plan_cluster(slow, ["softmax:3B"]).models[0].hours > two
    assert "between hosts: as given" in slow.source


def test_every_link_has_a_source() -> None:
    assert all("data sheet" in links.source for links in LINKS.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cluster", "H100"), "a number, x and a machine"),
        (("--cluster", "8xH900"), "machine 'H900'"),
        (("--cluster", "8xRTX 4090"), "--link-between"),
        (("--cluster", "12xH100"), "take 16"),
        (("--cluster", "0xH100"), "the number of machines=0"),
        (("--cluster", "8xH100", "--link-inside", "450"), "such as 450GB/s"),
        (("--cluster", "8xH100", "--utilization", "1.5"), "above 0 and at most 1"),
        (("--cluster", "8xH100", "--tokens", "many"), "write it such as"),
        (("--cluster", "64xH100", "--step-tokens", "1k"), "raise --step-tokens"),
        (("--cluster", "8xH100", "--fits", "8GiB"), "--fits beside --cluster"),
        (("--cluster", "8xH100", "--tp", "3"), "tensor parallelism over 3 ranks of 8"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    assert main(["plan", *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown, shown
    assert shown.count("\n") == 1


def test_the_command_prints_a_table_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--cluster", "64xH100", "--json"]) == 0
    out, shown = capsys.readouterr()
    assert json.loads(out) == json.loads(json.dumps(plan_cluster("64xH100").to_json()))
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert "GPU-hours" in shown
    assert "Assumed, not measured" in shown


def test_a_given_layout_is_the_only_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "softmax:3B", "--shard", "full", "--checkpointing", "--json")
    assert main(["plan", "--cluster", "64xH100", *words]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert [(one["shard"], one["tp"], one["checkpointing"]) for one in model["layouts"]] == [("full", 1, True)]
