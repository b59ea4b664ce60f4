"""The page of a text's maps in a real browser: its numbers are the library's, wherever one points."""

import json
from pathlib import Path

import pytest
import torch
from support.browser import needs_chromium, opened
from support.needle_model import haystack, reader

from diffattn.cli.main import main
from diffattn.errors import CheckpointError, ConfigError, DataError
from diffattn.model.loading import load
from diffattn.probes import lens as lens_module
from diffattn.probes.lens import attention_maps, lens
from diffattn.report.lens_page import render_lens, write_lens_pngs

TEXT = "Line 3 is about rain. The magic number of Lima is 48219. Line 4 is about <b>old</b> wine. What is it? It is"
ANSWER = "48219"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, tokenizer = tmp_path_factory.mktemp("models"), haystack().tokenizer
    for attention in ("softmax", "diff_v1", "diff_v2", "diff_gda", "llama"):
        reader(attention).save_pretrained(root / attention)
        tokenizer.save_pretrained(root / attention)
    return root


def readout(page, model: int = 0) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in page.locator(f"#readout span[data-model='{model}']")
        .evaluate("span => ({...span.dataset})")
        .items()
        if key != "model"
    }


def expected(folder: Path, ids: list[int], layer: int, head: int, query: int, key: int) -> dict[str, float]:
    model, _ = load(folder)
    maps = attention_maps(model, torch.tensor([ids]), layer=layer, head=head)
    names = {"pos": "map_pos", "neg": "lam_map_neg", "diff": "map_diff"}
    found = {short: maps.maps[name][query][key] for short, name in names.items() if name in maps.maps}
    return {"diff": found["pos"]} | found


def reads(page, words: str) -> None:
    """Waits until the page says so; the page itself forbids scripts that are made of text."""
    from playwright.sync_api import expect

    expect(page.locator("#readout")).to_contain_text(words)


def point_at(page, canvas, query: int, key: int, count: int) -> None:
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + (key + 0.5) / count * box["width"], box["y"] + (query + 0.5) / count * box["height"])
    reads(page, f"({query}) looks at")
    reads(page, f"({key}):")


@needs_chromium
@pytest.mark.parametrize("attention", ["softmax", "diff_v1", "diff_v2", "diff_gda", "llama"])
def test_numbers_are_the_librarys_wherever_one_points(attention, folders, browser, tmp_path):
    result = lens([folders / attention], TEXT)
    ids = load(folders / attention)[1](TEXT)["input_ids"]
    with opened(browser, render_lens(result), tmp_path) as page:
        canvas = page.locator("section[data-model='0'] canvas").first
        heads = result.models[0].heads
        for layer, head in ((0, 0), (1, heads - 1), (1, 1)):
            page.select_option("#layer", str(layer))
            page.select_option("#head", str(head))
            for query, key in ((len(ids) - 1, 0), (20, 17), (9, 9)):
                point_at(page, canvas, query, key, len(ids))
                assert readout(page) == pytest.approx(
                    expected(folders / attention, ids, layer, head, query, key), abs=2e-6
                )
        # A differential model has three maps to point at; of heads that share a noise map all are there, and it once.
        count = {"diff_v1": 3, "diff_v2": 3, "diff_gda": 5}
        assert page.locator(".maps canvas").count() == count.get(attention, 1)
        if attention == "diff_gda":
            page.select_option("#head", "1")
            titles = page.locator(".maps h3").all_inner_texts()
            assert titles[0].startswith("head 0: softmax(Q₁K₁ᵀ)")
            assert titles[1].startswith("head 1: softmax(Q₁K₁ᵀ)")
            assert titles[3].endswith("shared by heads 0 to 2")
            assert titles[4].startswith("head 1: difference")


@needs_chromium
def test_two_models_answer_to_one_pointer_and_to_the_keyboard(folders, browser, tmp_path):
    result = lens([folders / "diff_v1", folders / "softmax"], TEXT, answer=ANSWER)
    ids = load(folders / "softmax")[1](TEXT)["input_ids"]
    with opened(browser, render_lens(result), tmp_path) as page:
        page.select_option("#head", "2")
        canvas = page.locator("section[data-model='0'] canvas").nth(2)
        canvas.focus()
        for key in ("ArrowUp", "ArrowUp", "ArrowLeft", "Shift+ArrowLeft"):
            page.keyboard.press(key)
        last = len(ids) - 1
        reads(page, f"({last - 2}) looks at")
        # V1 has half the heads: its head 2 is softmax' heads 4 and 5.
        query, key = last - 2, last - 2 - 11
        reads(page, f"({key}):")
        assert readout(page, 0) == pytest.approx(expected(folders / "diff_v1", ids, 0, 2, query, key), abs=2e-6)
        assert readout(page, 1) == pytest.approx(expected(folders / "softmax", ids, 0, 4, query, key), abs=2e-6)
        facts = page.locator(".facts").all_inner_texts()
        assert all("spread over" in text and "noise" in text and "answer" in text for text in facts)
        # The shares of the row, by the library's map.
        model, _ = load(folders / "softmax")
        row = torch.tensor(attention_maps(model, torch.tensor([ids]), layer=0, head=4).map_pos[query])
        start, end = result.answer
        noise = (row[1:query].sum() - row[start:end].sum()) / row.sum()
        assert f"noise {noise:.3f}" in facts[1]
        assert f"answer {row[start:end].sum() / row.sum():.3f}" in facts[1]
        # The token that asks can be clicked in the text, and moved by the slider.
        page.locator("section[data-model='1'] .text span").nth(7).click()
        reads(page, "(7) looks at")
        assert page.locator("section[data-model='0'] .text span.query").inner_text() == result.tokens[7]
        page.locator("#query").fill("11")
        reads(page, "(11) looks at")
        # What was chosen is in the address.
        again = browser.new_page()
        again.goto(page.url)
        assert again.locator("#readout").inner_text() == page.locator("#readout").inner_text()
        again.close()


@needs_chromium
def test_page_fits_a_telephone_and_a_desk(folders, browser, tmp_path):
    result = lens([folders / "diff_v2", folders / "softmax"], TEXT)
    for width in (400, 1400):
        with opened(browser, render_lens(result), tmp_path, width=width) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            columns = {
                round(box["x"])
                for box in (c.bounding_box() for c in page.locator("section[data-model='0'] .maps canvas").all())
            }
            assert len(columns) == (1 if width == 400 else 3)


@needs_chromium
def test_a_thousand_tokens_stay_smooth(folders, browser, tmp_path):
    """Pointing moves at the screen's pace, in half precision: some hundred moves within a few seconds."""
    text = " ".join(["Line 3 is about rain and old wine."] * 400)
    tokenizer = load(folders / "diff_v2")[1]
    ids = tokenizer(text)["input_ids"][:1024]
    text = tokenizer.decode(ids)
    result = lens([folders / "diff_v2"], text, layers=[1])
    count = len(result.tokens)
    assert count > 1000
    with opened(browser, render_lens(result), tmp_path) as page:
        canvas = page.locator("canvas").first
        box = canvas.bounding_box()
        seconds = page.evaluate(
            """async ([x, y, width]) => {
                const canvas = document.querySelector(".maps canvas");
                const began = performance.now();
                for (let i = 0; i < 60; i++) {
                    canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: x + i, clientY: y + width / 2 + i}));
                    await new Promise(requestAnimationFrame);
                }
                return (performance.now() - began) / 1000;
            }""",
            [box["x"], box["y"], box["width"]],
        )
        assert seconds < 6
        point_at(page, canvas, 700, 350, count)
        right = expected(folders / "diff_v2", tokenizer(text)["input_ids"], 1, 0, 700, 350)
        assert readout(page) == pytest.approx(right, abs=2e-4)


def test_long_texts_are_kept_in_half_precision_and_too_long_ones_refused(folders, monkeypatch):
    monkeypatch.setattr(lens_module, "FLOAT32_BYTES", 1000)
    assert lens([folders / "diff_v1"], TEXT).models[0].dtype == "float16"
    monkeypatch.setattr(lens_module, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="MB; wanted at most 0 MB in a page: name fewer layers"):
        lens([folders / "diff_v1"], TEXT)


def test_what_the_page_holds_cannot_end_its_data(folders):
    page = render_lens(lens([folders / "softmax"], "</script><!-- <b> Lima & rain"))
    assert page.count("<script") == 3
    assert "<!--" not in page
    assert "http" not in page.split("</style>")[1].split('id="data"')[0]


def test_pictures(folders, tmp_path):
    result = lens([folders / "diff_v1", folders / "softmax"], "Lima is old", picture=(1, 3))
    written = write_lens_pngs(result, tmp_path / "maps.png")
    assert [path.name for path in written] == ["maps.png", "maps-softmax.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(ConfigError, match=r"layer 1 and head 6 given.*layers 0 to 2 and heads 0 to 5"):
        lens([folders / "diff_v1"], "Lima is old", picture=(1, 6))


def test_the_verb_writes_the_page(folders, tmp_path, capsys):
    page, picture = tmp_path / "new" / "page.html", tmp_path / "new" / "page.png"
    command = ["lens", str(folders / "diff_v2"), "--text", TEXT, "--html", str(page), "--png", str(picture), "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["models"][0]["attention"] == "diff_v2"
    assert f"{page} shows" in err
    assert page.stat().st_size > 10_000
    assert picture.stat().st_size > 10_000
    assert main(["lens", str(folders / "absent"), "--text", TEXT, "--html", str(tmp_path / "no.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "no.html").exists()


def test_what_cannot_be_is_refused(folders, tmp_path):
    one = folders / "softmax"
    with pytest.raises(ConfigError, match="3 models given; wanted one, or two"):
        lens([one] * 3, TEXT)
    with pytest.raises(ConfigError, match="the text has 0 tokens; wanted 2 to 2,048"):
        lens([one], "")
    with pytest.raises(ConfigError, match=r"layers are \[7\]; wanted layers 0 to 2"):
        lens([one], TEXT, layers=[7])
    with pytest.raises(DataError, match="the answer 'Oslo' is not in the text"):
        lens([one], TEXT, answer="Oslo")
    with pytest.raises(CheckpointError):
        lens([tmp_path], TEXT)
    other = tmp_path / "other"
    reader("softmax").save_pretrained(other)
    from diffattn.data.tokenizer import train_tokenizer

    train_tokenizer([], 257).save_pretrained(other)
    with pytest.raises(DataError, match="in different tokens; wanted models with one tokenizer"):
        lens([one, other], TEXT)
