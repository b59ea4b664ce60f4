"""The page with its real engine in Chromium: tokens and maps are the library's, also where a browser lacks much."""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
import torch
from support.browser import needs_chromium, opened_file
from support.needle_model import VOCABULARY, haystack
from support.small_models import SHAPE, small_model

from diffattn.demo.build import build_demo
from diffattn.demo.subject import graph
from diffattn.export.run import MODEL_FILE, OnnxDecoder
from diffattn.model.loading import load
from diffattn.plan.shape import ModelShape
from diffattn.probes.lens import attention_maps
from diffattn.progress import unseen

TEXT = "Line 3 is about rain. The magic number of Lima is 48219. Line 4 is about <b>old</b> wine. What is it? It is"
NEW = 10
# What a browser without them has: its workers too, which begin with this.
NO_SUSPENDING = """
const plain = Blob;
window.Blob = class extends plain {
  constructor(parts, options) {
    const code = options?.type === "text/javascript" && typeof parts[0] === "string";
    super(code ? ["delete WebAssembly.Suspending; delete WebAssembly.promising;", ...parts] : parts, options);
  }
};
"""
MAPS = """() => views.map(({ maps }) => {
    const row = (map, t) => [...map.subarray(t * maps.stride, t * maps.stride + maps.count)];
    const rows = (map) => Array.from({ length: maps.count }, (_, t) => row(map, t));
    return { found: rows(maps.found), used: rows(maps.used) };
})"""
pytestmark = [
    pytest.mark.full,
    needs_chromium,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine to fetch the page's programs with"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    # A width of which past and present share buffers, as in all models of use.
    sizes = {"num_layers": 2, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    shape = dataclasses.replace(SHAPE, **sizes)
    for attention in ("diff_v1", "diff_v2", "softmax"):
        small_model(attention, shape=shape).save_pretrained(root / attention)
        haystack().tokenizer.save_pretrained(root / attention)
    return root


@pytest.fixture(scope="module")
def page_of(folders, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("pages"), {}

    def page(attention: str, bits: int):
        name = f"{attention}-{bits}"
        if name not in made:
            made[name] = root / f"{name}.html"
            made[name].write_bytes(build_demo([folders / attention], bits=bits, text=TEXT, answer="48219").page)
        return made[name]

    return page


def write(page, most: int) -> list[list[int]]:
    """Has the page write, and returns the tokens that its models wrote."""
    page.wait_for_selector("#state[data-state=ready]", timeout=120_000)
    page.evaluate(
        """(most) => {
            window.written = views.map(() => []);
            const plain = engine.onmessage;
            engine.onmessage = (event) => {
                if (event.data.kind === "step") written[event.data.index].push(event.data.id);
                plain(event);
            };
            document.getElementById("most").append(new Option(most, most, true, true));
            document.getElementById("write").click();
        }""",
        most,
    )
    page.wait_for_selector("#state[data-state=ready]", timeout=120_000)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("written")


def compare_maps(drawn, model, read: list[int], layer: int, head: int, limit: float) -> None:
    right = attention_maps(model, torch.tensor([read]), layer=layer, head=head).maps
    for name, wanted in (("found", right["map_pos"]), ("used", right.get("map_diff", right["map_pos"]))):
        assert np.abs(np.array(drawn[name]) - np.array(wanted)).max() < limit
        assert np.array(wanted).max() > 0.1


@pytest.mark.parametrize("attention", ["diff_v1", "diff_v2", "softmax"])
@pytest.mark.parametrize("before", ["", NO_SUSPENDING], ids=["whole", "no suspending"])
def test_float_tokens_and_maps_are_those_of_the_library(before, attention, folders, page_of, browser):
    if before and attention != "diff_v2":
        pytest.skip("one model is enough")
    model, tokenizer = load(folders / attention, "float32", "cpu")
    ids = tokenizer(TEXT)["input_ids"]
    wanted = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
    with opened_file(browser, page_of(attention, 32), before=before) as page:
        (written,) = write(page, NEW)
        assert written == wanted
        assert page.get_attribute("#state", "data-engine") == "wasm"
        for layer, head in ((0, 0), (1, 2)):
            page.select_option(".layer", str(layer))
            page.select_option(".head", str(head))
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            compare_maps(page.evaluate(MAPS)[0], model, [*ids, *wanted[:-1]], layer, head, 1e-3)


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_tokens_and_maps_of_8_bits_are_those_of_onnxruntime(folders, page_of, browser, tmp_path):
    content, _ = graph(folders / "diff_v2", 8, unseen)
    # The processor's kernels round activations to 8 bits too; the browser's have none of that kind for 8-bit weights.
    model = onnx.load_from_string(content)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    (tmp_path / MODEL_FILE).write_bytes(model.SerializeToString())
    decoder = OnnxDecoder(tmp_path)
    ids = haystack().tokenizer(TEXT)["input_ids"]
    text = decoder.generate(np.array([ids]), NEW)[0].tolist()
    read = np.array([text[:-1]])
    given = {"input_ids": read, "attention_mask": np.ones_like(read), "position_ids": np.arange(read.size)[None]}
    past = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in decoder.session.get_inputs()
        if each.name.startswith("past")
    }
    names = ["maps.1.query", "maps.1.lambda", "present.1.key"]
    (queries,), (lam,), (keys,) = decoder.session.run(names, given | past)
    keys = keys.repeat(len(queries) // len(keys), 0)
    seen = np.tri(read.size, dtype=bool)
    signal, noise = softmax(np.where(seen, queries[:2] @ keys[:2].swapaxes(1, 2) / np.sqrt(queries.shape[2]), -np.inf))
    with opened_file(browser, page_of("diff_v2", 8)) as page:
        (written,) = write(page, NEW)
        assert written == text[len(ids) :]
        page.select_option(".layer", "1")
        page.select_option(".head", "0")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        drawn = page.evaluate(MAPS)[0]
    assert np.abs(np.array(drawn["found"]) - signal).max() < 1e-3
    assert np.abs(np.array(drawn["used"]) - (signal - lam[:, :1] * noise)).max() < 1e-3


def test_too_long_a_text_and_none_are_one_line_and_writing_can_be_stopped(page_of, browser):
    with opened_file(browser, page_of("diff_v2", 8)) as page:
        page.wait_for_selector("#state[data-state=ready]", timeout=120_000)
        for text, line in (
            ("rain " * 999, "tokens; these models read at most 256. Please shorten it."),
            ("", "There is no text yet. Please write a few words first."),
        ):
            page.fill("#text", text)
            page.click("#write")
            page.wait_for_selector("#state[data-state=failed]")
            assert line in page.inner_text("#state")
        page.fill("#text", TEXT)
        page.evaluate("document.getElementById('most').append(new Option(190, 190, true, true))")
        # Within the page: this model is done before a click from outside comes.
        page.evaluate(
            """() => new Promise((done) => {
                const seen = new MutationObserver(() => {
                    if (!document.querySelector(".text span.new")) return;
                    seen.disconnect();
                    document.getElementById("stop").click();
                    done();
                });
                seen.observe(document.body, {childList: true, subtree: true});
                document.getElementById("write").click();
            })"""
        )
        page.wait_for_selector("#state[data-state=ready]")
        assert 1 <= page.locator(".text span.new").count() < 190


def test_a_pair_of_3m_answers_within_a_second_and_writes_20_tokens_a_second(tmp_path, browser):
    """On one thread of a quiet machine: the best of a few attempts, since others may use this one."""
    shape = ModelShape.preset("3M")
    for attention in ("diff_v2", "softmax"):
        small_model(attention, shape=shape).save_pretrained(tmp_path / attention)
        haystack().tokenizer.save_pretrained(tmp_path / attention)
    file = tmp_path / "page.html"
    file.write_bytes(build_demo([tmp_path / "diff_v2", tmp_path / "softmax"]).page)
    first, speed = [], []
    with opened_file(browser, file) as page:
        for _ in range(5):
            write(page, 20)
            first.append(page.evaluate("Math.max(...views.map((view) => view.first))"))
            speed.append(page.evaluate("Math.min(...views.map((view) => (view.steps - 1) / view.spent))"))
    print(f"first token {min(first):.3f} s, {max(speed):.1f} tokens/s")
    assert min(first) <= 1
    assert max(speed) >= 20
