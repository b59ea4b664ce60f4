"""What a visitor of the page sees and does, with numbers of the models in the engine's place: maps, keys, widths."""

import base64
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from support.browser import needs_chromium, opened_file
from support.needle_model import VOCABULARY, haystack
from support.small_models import SHAPE, small_model

from diffattn.demo.page import render_demo
from diffattn.demo.panel import panel
from diffattn.demo.prompts import Prompt, answer_tokens
from diffattn.demo.subject import facts
from diffattn.export.graph import FlatDecoder
from diffattn.model.transformers_private import attention_implementation
from diffattn.probes.lens import attention_maps

TEXT = "Line 3 is about rain. The magic number of Lima is 48219. Line 4 is about <b>old</b> wine. What is it? It is"
PROMPT = Prompt("A number", TEXT, "48219")
NEW = 4
READER = dataclasses.replace(SHAPE, vocab_size=VOCABULARY, max_position_embeddings=8192)
WINDOW = {"sliding_window": 9, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
MODELS = {
    "softmax": ("softmax", {}), "diff_v1": ("diff_v1", {}), "diff_v2": ("diff_v2", {}),
    "diff_gda": ("diff_gda", {}), "windows": ("diff_v2", WINDOW),
}  # fmt: skip
RARE = ("diff_gda", "windows")
PLAN = panel()
pytestmark = needs_chromium

# Stands in for the engine: it has read the text before, and gives the steps of it when it is asked to write.
ENGINE = """
const STEPS = %s;
const floats = (text) => text && new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
window.asked = [];
window.Worker = class {
  constructor() { window.engine = this; }
  terminate() {}
  say(message) { setTimeout(() => this.onmessage({ data: message })); }
  postMessage(message) {
    if (message.kind !== "load") asked.push(message);
    if (message.kind === "load") this.say({ kind: "ready", engine: "wasm", webgpu: false, reason: "", same: true });
    if (message.kind !== "write") return;
    const { run, most } = message;
    this.say({ kind: "read", run, room: most, ...STEPS.text });
    STEPS.models.forEach((steps, index) => steps.slice(0, most).forEach(({ reads, ...step }) => {
      const numbers = reads.map((each) => Object.fromEntries(Object.entries(each).map(([k, v]) => [k, floats(v)])));
      this.say({ kind: "step", run, index, seconds: 0.02, bytes: 12345, reads: numbers, ...step });
    }));
    this.say({ kind: "done", run, whole: true });
  }
};
"""


def encoded(numbers: torch.Tensor) -> str:
    return base64.b64encode(numbers.float().contiguous().numpy().tobytes()).decode()


@torch.no_grad()
def steps_of(model, ids: list[int], tokenizer) -> tuple[list[dict], list[int]]:
    """What the engine would say of each token that the model writes, and all tokens that it has read by then."""
    layers = list(range(model.config.num_hidden_layers))
    decoder = FlatDecoder(model, cache=True, shared=False, maps=layers).eval()
    config, text, fresh, steps = model.config, list(ids), list(ids), []
    past = [torch.zeros(1, config.num_key_value_heads, 0, config.head_dim) for _ in layers for _ in "kv"]
    # The model's own kernel does several steps at once, of which the maps' numbers are within.
    with attention_implementation(model, "sdpa"):
        for _ in range(NEW):
            places = torch.arange(len(text) - len(fresh), len(text))[None]
            found = decoder(torch.tensor([fresh]), torch.ones(1, len(text), dtype=torch.long), places, *past)
            past, read = list(found[1 : 1 + len(past)]), list(found[1 + len(past) :])
            token = int(found[0][0, -1].argmax())
            each = len(read) // len(layers)
            reads = [
                {
                    "queries": encoded(read[layer * each]),
                    "lam": encoded(read[layer * each + 1]) if each > 1 else None,
                    "keys": encoded(past[2 * layer][:, :, -len(fresh) :]),
                }
                for layer in layers
            ]
            steps.append({"id": token, "token": tokenizer.decode([token]), "reads": reads})
            text, fresh = [*text, token], [token]
    return steps, text[:-1]


@dataclasses.dataclass
class Shown:
    """A page of one or two models, the script that stands in for its engine, and what the models have read."""

    file: Path
    engine: str
    models: list
    read: list[list[int]]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("pages"), {}
    tokenizer = haystack().tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    offsets = tokenizer(TEXT, return_offsets_mapping=True)["offset_mapping"]
    text = {"ids": ids, "tokens": [tokenizer.decode([token]) for token in ids], "ends": [end for _, end in offsets]}

    def page(*names: str) -> Shown:
        if names not in made:
            models = [small_model(attention, shape=READER, **config) for attention, config in map(MODELS.get, names)]
            told = [facts(model, ids, None) for model in models]
            for fact, name in zip(told, names, strict=True):
                fact |= {"name": name, "blob": name, "bits": 8, "weight_bytes": 3_400_000, "file_bytes": 3_500_000}
            prompt = dataclasses.asdict(PROMPT) | {"heads": [{"layer": 1, "head": 0}] * len(names)}
            other = {"title": "Another", "text": "Line 4", "answer": None, "heads": prompt["heads"]}
            data = {
                "models": told, "prompts": [prompt, other], "plan": PLAN, "context": 8192, "packages": [],
                "check": {"text": "", "ids": []}, "command": "diffattn demo",
            }  # fmt: skip
            file = root / f"{'-'.join(names)}.html"
            file.write_bytes(render_demo(data, {}))
            found = [steps_of(model, ids, tokenizer) for model in models]
            engine = ENGINE % json.dumps({"text": text, "models": [steps for steps, _ in found]})
            made[names] = Shown(file, engine, models, [read for _, read in found])
        return made[names]

    return page


def opened(browser, shown: Shown, **options):
    return opened_file(browser, shown.file, before=shown.engine, **options)


def write_all(page) -> None:
    page.wait_for_selector("#state[data-state=ready]")
    page.click("#write")
    page.wait_for_selector("#state[data-state=ready]")
    # What is drawn is drawn before the next frame but one.
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in RARE else ()) for name in MODELS]
)
def test_maps_that_grow_are_the_librarys(name, pages, browser):
    shown = pages(name)
    (model,), (read,) = shown.models, shown.read
    ask = """() => {
        const { maps } = views[0];
        const row = (map, t) => [...map.subarray(t * maps.stride, t * maps.stride + t + 1)];
        const rows = (map) => map && Array.from({ length: maps.count }, (_, t) => row(map, t));
        return { found: rows(maps.found), taken: rows(maps.taken), used: rows(maps.used), lam: maps.lam };
    }"""
    with opened(browser, shown) as page:
        write_all(page)
        heads = page.locator(".head option").count()
        for layer, head in ((0, 0), (1, heads - 1), (2, 1)):
            page.select_option(".layer", str(layer))
            page.select_option(".head", str(head))
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            drawn = page.evaluate(ask)
            right = attention_maps(model, torch.tensor([read]), layer=layer, head=head)
            wanted = {"found": right.maps["map_pos"], "used": right.maps.get("map_diff", right.maps["map_pos"])}
            if "lam_map_neg" in right.maps:
                wanted["taken"] = [[-value for value in row] for row in right.maps["lam_map_neg"]]
                lam = right.lam if isinstance(right.lam, list) else [right.lam] * len(read)
                assert drawn["lam"] == pytest.approx(lam, abs=1e-5)
            assert len(drawn["used"]) == len(read) == len(haystack().tokenizer(TEXT)["input_ids"]) + NEW - 1
            for kind, rows in wanted.items():
                for t, row in enumerate(drawn[kind]):
                    assert row == pytest.approx(rows[t][: t + 1], abs=1e-5), (kind, layer, head, t)


def test_a_visitor_reads_what_is_written_and_how_much_of_the_look_is_on_the_number(pages, browser):
    shown = pages("diff_v2", "softmax")
    tokenizer = haystack().tokenizer
    ids = tokenizer(TEXT)["input_ids"]
    start, end = answer_tokens(TEXT, PROMPT.answer, tokenizer)
    with opened(browser, shown) as page:
        write_all(page)
        for index, (model, read) in enumerate(zip(shown.models, shown.read, strict=True)):
            card = page.locator(f".card[data-model='{index}']")
            new = "".join(card.locator(".text span.new").all_text_contents())
            assert new[: len(tokenizer.decode(read[len(ids) :]))].replace("↵", "") == tokenizer.decode(read[len(ids) :])
            assert "".join(card.locator(".text span.answer").all_text_contents()).strip() == PROMPT.answer
            maps = attention_maps(model, torch.tensor([ids]), layer=1, head=0).maps
            row = torch.tensor(maps.get("map_diff", maps["map_pos"])[-1]).abs()
            share = float(row[start:end].sum() / row.sum())
            assert float(card.locator(".share").get_attribute("data-share")) == pytest.approx(share, abs=1e-5)
            numbers = dict(
                zip(("speed", "first", "weights", "cache"), card.locator("dd").all_inner_texts(), strict=True)
            )
            assert numbers == {"speed": "50 tokens/s", "first": "0.02 s", "weights": "3.4 MB", "cache": "12 kB"}
        assert page.locator("#state").inner_text() == "Ready: runs on WebAssembly, on one thread of the processor."


def test_the_keyboard_alone_is_enough(pages, browser):
    shown = pages("diff_v2", "softmax")
    with opened(browser, shown) as page:
        page.wait_for_selector("#state[data-state=ready]")
        reached, framed = [], []
        for _ in range(40):
            page.keyboard.press("Tab")
            name, outline = page.evaluate("""() => {
                const at = document.activeElement, shown = getComputedStyle(at);
                return [at.id || at.dataset.map || at.name || at.className || at.textContent, shown.outlineStyle];
            }""")
            reached.append(name)
            framed.append(outline)
        # Stop waits for something to stop, and the switch to WebGPU for a browser that has it.
        order = [
            "A number",
            "Another",
            "text",
            "write",
            "layer",
            "head",
            "found",
            "taken",
            "used",
            "layer",
            "head",
            "used",
            "size",
        ]
        places = iter(reached)
        assert all(any(name == wanted for name in places) for wanted in order), reached
        assert set(framed[: reached.index("size")]) == {"solid"}
        page.focus("#text")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#state[data-state=ready]")
        assert page.evaluate("asked.at(-1).most") == 30
        page.focus(".lens[data-model='0'] canvas[data-map='found']")
        place = """() => [...document.querySelectorAll("#readout span")].map(
            (part) => [part.dataset.query, part.dataset.key].map(Number))"""
        last = len(shown.read[0]) - 1
        for key in ("ArrowUp", "ArrowUp", "ArrowDown"):
            page.keyboard.press(key)
        page.keyboard.press("Shift+ArrowLeft")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        (query, key), (other, _) = page.evaluate(place)
        assert query == other == last - 1
        assert key <= query
        assert page.get_attribute("#readout", "aria-live") == "polite"


@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1400, "light")])
def test_page_fits_a_telephone_and_a_desk_by_day_and_night(width, scheme, pages, browser):
    with opened(browser, pages("diff_v2", "softmax"), width=width, scheme=scheme) as page:
        write_all(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [each.bounding_box() for each in page.locator(".lens[data-model='0'] canvas[data-map]").all()]
        assert len({round(box["x"]) for box in boxes}) == (1 if width == 400 else 3)
        cards = [each.bounding_box() for each in page.locator(".card").all()]
        assert len({round(box["x"]) for box in cards}) == (1 if width == 400 else 2)
        # Every control is as large as a finger, and every word stands out from what is behind it.
        for control in page.locator("button, select, summary").all():
            if control.is_visible() and control.inner_text() != "":
                assert control.bounding_box()["height"] >= 24
        ink, paper = page.evaluate(
            """() => ["color", "backgroundColor"].map((name) => getComputedStyle(document.body)[name])"""
        )
        muted = page.evaluate("getComputedStyle(document.querySelector('.hint')).color")
        assert contrast(ink, paper) > 7
        assert contrast(muted, paper) > 4.5
        unseen = page.evaluate("""() => {
            const canvas = document.querySelector("canvas[data-map]");
            return [...canvas.getContext("2d").getImageData(canvas.clientWidth * 0.7, 3, 1, 1).data.slice(0, 3)];
        }""")
        assert (max(unseen) < 60) == (scheme == "dark")


def contrast(first: str, second: str) -> float:
    def light(colour: str) -> float:
        channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    brighter, darker = sorted((light(first), light(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def test_a_browser_without_simd_says_so_in_one_line(pages, browser):
    shown = pages("softmax")
    with opened_file(browser, shown.file, before="WebAssembly.validate = () => false;") as page:
        page.wait_for_selector("#state[data-state=failed]")
        text = page.inner_text("#state")
        assert text.startswith("This browser cannot run the models: it has no WebAssembly with SIMD. Please open")
        assert page.is_disabled("#write")


def test_one_model_alone_is_said_to_be_one(pages, browser):
    with opened(browser, pages("diff_v2")) as page:
        write_all(page)
        assert not page.locator(".lead .pair").is_visible()
        assert page.locator(".card").count() == page.locator(".lens").count() == 1


def test_the_slider_answers_with_the_planners_numbers(pages, browser):
    rows = PLAN["rows"]
    with opened(browser, pages("diff_v2", "softmax")) as page:
        for index in (0, len(rows) // 2, len(rows) - 1):
            page.locator("#size").fill(str(index))
            row = rows[index]["equal"]
            ratios = {kind: row["diff_v2"][kind] / row["softmax"][kind] for kind in ("decoding", "training")}
            text = page.inner_text("#verdict")
            assert f"Using it takes {ratios['decoding']:.2f} times" in text
            assert f"training it {ratios['training']:.2f} times" in text
            assert text.startswith("No." if max(ratios.values()) < 1.2 else "Not twice")
            shown = page.locator("#training .bar b").all_inner_texts()
            assert [amount(each) for each in shown] == pytest.approx(
                [row[kind]["training"] for kind in ("softmax", "diff_v2")], rel=0.06
            )
            width = page.evaluate("""() => [...document.querySelectorAll("#written .track")].map(
                (track) => track.firstChild.getBoundingClientRect().width)""")
            assert math.isclose(
                width[0] / width[1], row["softmax"]["written"] / row["diff_v2"]["written"], rel_tol=0.02
            )


def amount(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
