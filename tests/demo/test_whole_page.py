"""The whole page with its real programs in Chromium: no request leaves, its tokens are the library's, and its size."""

import contextlib
import json
import shutil
import socket

import pytest
from support.browser import needs_chromium, opened_file
from support.hostile import HOSTILE
from support.small_models import small_model

from diffattn.data.tokenizer import train_tokenizer
from diffattn.demo.build import build_demo
from diffattn.demo.page import render_demo
from diffattn.demo.runtime import TOKENIZERS, runtime
from diffattn.demo.tokenizer import page_tokenizer
from diffattn.plan.shape import ModelShape

LARGEST = 12_000_000
# What the models wrote, in a browser that can suspend WebAssembly and in one that cannot.
WRITTEN: dict[bool, list[str]] = {}
pytestmark = [
    pytest.mark.full,
    needs_chromium,
    pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine to fetch the page's programs with"),
]


@pytest.fixture(scope="module")
def programs():
    return runtime()


def sentencepiece_like():
    """BPE with bytes for what is no token, as Llama 2 has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    return tokenizer, trainer


def split_like():
    """Words cut by a pattern of letters, numbers and marks, as Llama 3 and Qwen have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    return tokenizer, trainer


def unigram_like():
    """Unigram over NFKC, as T5 has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
    )
    return tokenizer, trainer


def tokenizer_of(kind: str):
    from transformers import PreTrainedTokenizerFast

    text = "The magic number of Oslo is 70035. Hello world, café 🦁 don't they'll 日本語 <|endoftext|>"
    if kind == "ours":
        return train_tokenizer([text], 400)
    tokenizer, trainer = globals()[kind]()
    tokenizer.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["ours", "sentencepiece_like", "split_like", "unigram_like"])
def test_the_page_cuts_a_hostile_text_as_the_library_does(kind, programs, browser, tmp_path):
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(tmp_path)
    blobs = page_tokenizer(tmp_path) | {"tokenizers": programs.files["tokenizers"]}
    file = tmp_path / "page.html"
    data = {"models": [], "prompts": [], "plan": None, "context": 1, "packages": [], "command": ""}
    file.write_bytes(render_demo(data, blobs))
    script = """async (texts) => {
        const code = new Blob([await unpack("tokenizers")], {type: "text/javascript"});
        const module = await import(URL.createObjectURL(code));
        const read = async (name) => JSON.parse(new TextDecoder().decode(await unpack(name)));
        const tokenizer = new module.Tokenizer(await read("tokenizer"), await read("tokenizer-config"));
        return texts.map((text) => tokenizer.encode(text).ids);
    }"""
    with opened_file(browser, file) as page:
        found = page.evaluate(script, list(HOSTILE.values()))
        # Half of a pair is no character; both programs read the sign for that.
        (half,) = page.evaluate(script, ["a\ud83d b"]) if kind == "ours" else (None,)
    for (name, text), ids in zip(HOSTILE.items(), found, strict=True):
        assert ids == tokenizer(text)["input_ids"], name
    if half is not None:
        assert half == tokenizer("a\ufffd b")["input_ids"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models of 3 M parameters with random weights, of which gzip saves least."""
    root = tmp_path_factory.mktemp("pair")
    shape = ModelShape.preset("3M")
    words = " ".join(f"word{number}" for number in range(9000))
    tokenizer = train_tokenizer([words], shape.vocab_size)
    for attention in ("diff_v1", "softmax"):
        small_model(attention, shape=shape).save_pretrained(root / attention)
        tokenizer.save_pretrained(root / attention)
    return build_demo([root / "diff_v1", root / "softmax"])


def test_a_page_of_two_models_of_3m_is_below_12_mb(pair):
    assert [model["parameters"] for model in pair.models] == pytest.approx([3e6, 3e6], rel=0.01)
    assert len(pair.page) <= LARGEST


def test_no_request_leaves_whatever_is_tried(pair, browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_bytes(pair.page)
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(1)
    attempts = """async (port) => {
        const tried = {};
        const attempt = async (name, doing) => {
            try { tried[name] = await doing(); } catch (error) { tried[name] = error.name; }
        };
        const address = `http://127.0.0.1:${port}/`;
        await attempt("fetch", async () => (await fetch(address)).status);
        await attempt("beacon", async () => navigator.sendBeacon(address));
        await attempt("socket", () => new Promise((resolve) => {
            const socket = new WebSocket(`ws://127.0.0.1:${port}/`);
            socket.onopen = () => resolve("open");
            socket.onerror = () => resolve("refused");
        }));
        await attempt("module", () => import(address));
        await attempt("image", () => new Promise((resolve) => {
            const image = new Image();
            image.onload = () => resolve("loaded");
            image.onerror = () => resolve("refused");
            image.src = address;
        }));
        await attempt("worker", () => new Promise((resolve) => {
            const code = `fetch("${address}").then(() => postMessage("sent"), () => postMessage("refused"))`;
            const worker = new Worker(URL.createObjectURL(new Blob([code])));
            worker.onmessage = ({ data }) => resolve(data);
        }));
        return tried;
    }"""
    with contextlib.closing(server), contextlib.closing(browser.new_context()) as context:
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.goto(file.as_uri())
        page.wait_for_selector("#state[data-state=ready]", timeout=120_000)
        opened_by_itself = list(asked)
        # A beacon is said to be sent before the page's policy is asked, so the server has to say that none came.
        tried = page.evaluate(attempts, server.getsockname()[1])
        with pytest.raises(TimeoutError):
            server.accept()
    assert not {"open", "loaded", "sent", 200} & set(tried.values()), tried
    assert [url for url in opened_by_itself if not url.startswith(("file:", "blob:"))] == []


@pytest.mark.parametrize("own", [True, False])
def test_models_write_the_same_where_a_browser_cannot_suspend_webassembly(own, pair, browser, tmp_path):
    page = pair.page.decode("utf-16")
    lacking = "delete WebAssembly.Suspending; delete WebAssembly.promising; delete WebAssembly.SuspendError;"
    place = '<script type="text/plain" id="worker">'
    assert page.count(place) == 1
    file = tmp_path / "page.html"
    file.write_text(page if own else page.replace(place, f"{place}{lacking}"), encoding="utf-16")
    with opened_file(browser, file) as shown:
        shown.wait_for_selector("#state[data-state=ready]", timeout=120_000)
        assert "WebAssembly" in shown.inner_text("#state")
        shown.click("#write")
        shown.wait_for_selector("#stop:not([disabled])")
        shown.wait_for_selector("#state[data-state=ready]", timeout=120_000)
        texts = shown.locator(".card .text").all_inner_texts()
    WRITTEN[own] = texts
    assert len(texts) == 2
    assert all(found == texts for found in WRITTEN.values())


def test_licences_are_in_the_page(pair, browser, tmp_path, programs):
    file = tmp_path / "page.html"
    file.write_bytes(pair.page)
    with opened_file(browser, file) as page:
        data = json.loads(page.text_content("#data"))
        read = "async (name) => new TextDecoder().decode(await unpack(name))"
        texts = {package["name"]: page.evaluate(read, package["blob"]) for package in data["packages"]}
    assert texts == programs.licences
    assert "MIT License" in texts["onnxruntime-web"]
    assert "Apache License" in texts[TOKENIZERS.name]
