"""The real server in a process of its own, asked by OpenAI's own client."""

import json
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from support.served import CONTEXT, KEY, SENTENCES, Served, running, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.openai_cases import CASES, ask
from diffattn.serve import vllm_engine
from diffattn.serve.openai_request import MOST_ANSWERS

NAME = "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_model(tmp_path_factory.mktemp("served") / NAME, "diff_v1")
    with running(folder, "--allow-host", "models.example.org", "other.example.org") as served:
        yield served


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return server.client()


@pytest.fixture
def goes_on(server: Served, client: openai.OpenAI) -> Iterator[Callable[[], None]]:
    """Asks the server again, which has to answer as before whatever was asked of it."""
    expected = complete(client, SENTENCES[0], max_tokens=8).choices[0].text

    def check() -> None:
        assert complete(client, SENTENCES[0], max_tokens=8).choices[0].text == expected
        assert server.health()["status"] == "ok"

    yield check
    check()


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": prompt, "temperature": 0, **options})


def talk(client: openai.OpenAI, said: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": said}]
    return client.chat.completions.create(**{"model": NAME, "messages": messages, "temperature": 0, **options})


class Alone:
    """The same model in this process, under ``generate``."""

    def __init__(self, served: Served) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(served.folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(served.folder)

    def answer(self, ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        output = self.model.generate(given, attention_mask=mask, max_new_tokens=count, do_sample=False)
        return output[0, len(ids) :].tolist()

    def text(self, prompt: str, count: int) -> str:
        answer = self.answer(self.tokenizer.encode(prompt), count)
        return self.tokenizer.decode(answer, skip_special_tokens=True)


def test_greedy_text_is_that_of_generate_and_tokens_are_counted(server, client):
    alone = Alone(server)
    for prompt in SENTENCES[:3]:
        answer = complete(client, prompt, max_tokens=40)
        assert answer.choices[0].text == alone.text(prompt, 40)
        assert len(set(answer.choices[0].text)) > 10
        assert answer.choices[0].finish_reason == "length"
        count = len(alone.tokenizer.encode(prompt))
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (count, 40, count + 40)
        assert (answer.model, answer.object) == (NAME, "text_completion")


def test_a_stream_has_the_same_text_and_counts_and_ends_as_clients_expect(server, client):
    whole = complete(client, SENTENCES[1], max_tokens=40)
    chunks = list(complete(client, SENTENCES[1], max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    body = json.dumps({"model": NAME, "prompt": "Once", "max_tokens": 2, "stream": True})
    status, headers, raw = post(server, "/v1/completions", body.encode())
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    assert raw.endswith(b"data: [DONE]\n\n")


def test_a_chat_is_the_completion_of_its_template(server, client):
    alone = Alone(server)
    said = [{"role": "user", "content": "Where is the boat?"}]
    prompt = alone.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    assert prompt == "user: Where is the boat?\nassistant:"
    answer = talk(client, "Where is the boat?", max_tokens=30)
    assert answer.choices[0].message.content == alone.text(prompt, 30)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 30
    chunks = list(talk(client, "Where is the boat?", max_completion_tokens=30, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    # A content of several parts is their text.
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "the boat?"}]
    again = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": parts}], max_tokens=30, temperature=0
    )
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_an_answer_ends_before_a_stop_text_and_frees_its_place(server, client):
    whole = complete(client, SENTENCES[2], max_tokens=60).choices[0].text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    for options in ({"stop": stop}, {"stop": ["never this", stop]}):
        answer = complete(client, SENTENCES[2], max_tokens=4000, **options)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
        assert answer.usage.completion_tokens < 60
    chunks = list(complete(client, SENTENCES[2], max_tokens=4000, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.becomes_free(1)


def test_the_end_token_ends_an_answer(client):
    for count in (1, 50):
        answer = complete(client, SENTENCES[0], max_tokens=count, logit_bias={"0": 100})
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("", "stop")
        assert answer.usage.completion_tokens == 1


def test_a_seed_gives_the_same_text_whatever_else_is_answered(client):
    def drawn(seed: int | None) -> str:
        options = {"temperature": 1.2, "top_p": 0.95, "seed": seed, "max_tokens": 40}
        return complete(client, SENTENCES[3], **options).choices[0].text

    alone = drawn(11)
    assert alone != drawn(12)
    assert alone != complete(client, SENTENCES[3], max_tokens=40).choices[0].text
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(drawn, [11, 12, 13, 11, 14, 15, 11, 16]))
    assert together[0] == together[3] == together[6] == alone
    assert len(set(together)) == 6
    without = {drawn(None) for _ in range(3)}
    assert len(without) == 3


def test_frequency_penalty_keeps_a_token_from_coming_again(server, client):
    (letter,) = Alone(server).tokenizer.encode("a")

    def repeats(**options: Any) -> int:
        text = complete(client, "a", max_tokens=60, logit_bias={str(letter): 40}, **options).choices[0].text
        return text.count("a")

    assert repeats() == 60
    # Each time takes 2 of the bias of 40.
    assert 10 <= repeats(frequency_penalty=2) <= 25


def test_32_streams_at_once_have_the_texts_of_one_after_another(client):
    prompts = [f"{at}. {SENTENCES[at % len(SENTENCES)]}" * (1 + at % 3) for at in range(32)]
    sequential = [complete(client, prompt, max_tokens=24).choices[0].text for prompt in prompts]
    assert len(set(sequential)) == 32
    start = threading.Barrier(32)

    def streamed(prompt: str) -> str:
        start.wait()
        return "".join(c.choices[0].text for c in complete(client, prompt, max_tokens=24, stream=True))

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(streamed, prompts)) == sequential


def test_a_client_that_leaves_frees_its_place(server, client, goes_on):
    # Far more tokens than are generated until the place has to be free.
    stream = complete(client, SENTENCES[4], max_tokens=4000, stream=True, logit_bias={"0": -100})
    for _ in range(5):
        next(stream)
    assert server.health()["requests"] == 1
    stream.close()
    assert server.becomes_free(3)
    with pytest.raises(openai.APITimeoutError):
        complete(server.client(), SENTENCES[4], max_tokens=4000, logit_bias={"0": -100}, timeout=0.3)
    assert server.becomes_free(3)


def test_a_prompt_beyond_the_context_is_refused(client, goes_on):
    count = complete(client, SENTENCES[0], max_tokens=1).usage.prompt_tokens
    for call in (complete, talk):
        for stream in (False, True):
            for text, options in (("a b " * CONTEXT, {}), (SENTENCES[0], {"max_tokens": CONTEXT - count + 1})):
                with pytest.raises(openai.BadRequestError) as caught:
                    call(client, text, stream=stream, **options)
                assert caught.value.code == "context_length_exceeded"
                assert f"{CONTEXT:,}" in caught.value.message
    # The longest that fits is answered to its end.
    answer = complete(client, "a b " * 2040, max_tokens=10)
    assert answer.usage.completion_tokens == 10


def test_what_a_completion_that_does_not_say_gets(client):
    assert complete(client, SENTENCES[0], logit_bias={"0": -100}).usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 129}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"extra_body": {"guided": 1}}, "guided"),
    ],
)
def test_a_parameter_that_cannot_be_served_is_an_error_of_the_client(client, goes_on, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{"prompt": "Once", **options})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_in_front_of_vllm_is_refused_what_is_refused_here_and_in_the_same_words(server, client, goes_on, monkeypatch):
    reached: list[bytes] = []

    async def vllm(scope, receive, send):
        reached.append((await receive())["body"])
        await JSONResponse({"choices": []})(scope, receive, send)

    monkeypatch.setenv("VLLM_API_KEY", KEY)
    monkeypatch.setenv(vllm_engine.GUARD, json.dumps(vllm_engine.Guarded(
        hosts=["localhost"], loopback_only=True, folder=str(server.folder), names=[NAME, str(server.folder)],
        context=CONTEXT,
    )))  # fmt: skip
    guard = TestClient(vllm_engine.Guard(vllm), base_url="http://localhost/v1")
    for name, case in CASES.items():
        fields = {key: value for key, value in case.fields.items() if key != "extra_body"}
        body = {"model": NAME} | fields | case.fields.get("extra_body", {})
        path = "/chat/completions" if case.chat else "/completions"
        answer = guard.post(path, json=body, headers={"authorization": f"Bearer {KEY}"})
        assert (answer.status_code == 200) == case.served, name
        if case.served:
            # As it came. vLLM gives one greedy answer alone: several are draws from the likeliest token.
            changed = {"temperature": 1.0, "top_k": 1} if name == "completion with n, greedy" else {}
            assert json.loads(reached[-1]) == body | changed, name
            continue
        given = ask(client, NAME, case)["refused"]
        assert {"status": answer.status_code} | answer.json()["error"] == given | {"type": "invalid_request_error"}, (
            name
        )
    # A wrong key, another type of body and another site's Host, too.
    for headers, status in (({}, 401), ({"authorization": "Bearer x"}, 401)):
        assert guard.post("/completions", json={}, headers=headers).status_code == status
    right = {"authorization": f"Bearer {KEY}"}
    assert guard.post("/completions", content=b"{}", headers=right | {"content-type": "text/plain"}).status_code == 415
    assert guard.post("/completions", json={}, headers=right | {"host": "evil.example.org"}).status_code == 403


def test_what_is_served_here_is_what_clients_ask_for(server, client, goes_on):
    answers = {name: ask(client, NAME, case) for name, case in CASES.items() if case.served}
    for name, answer in answers.items():
        assert answer["answers"], name
        assert len(answer["answers"]) == CASES[name].fields.get("n", 1) * (2 if "several" in name else 1), name
        assert all(part["reason"] == ("stop" if "stop" in name else "length") for part in answer["answers"]), name
        assert all(bool(part["tokens"]) == ("logprobs" in name) for part in answer["answers"]), name
    for name in ("completion", "chat", "completion with echo"):
        assert answers[f"{name} in a stream"]["answers"] == answers[name]["answers"]
    assert answers["completion with echo"]["answers"][0]["text"].startswith(CASES["completion"].fields["prompt"])


def test_an_unknown_model_is_not_found(server, client, goes_on):
    for call in (complete, talk):
        with pytest.raises(openai.NotFoundError) as caught:
            call(client, "Once", model="gpt-5")
        assert caught.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == [NAME]
    # The folder as it was given is a name too.
    assert complete(client, "Once", model=str(server.folder), max_tokens=1).model == NAME


def test_a_model_is_described_by_its_name(server, client, goes_on):
    for name in (NAME, str(server.folder)):
        status, _, raw = post(server, f"/v1/models/{name}", None)
        assert (status, json.loads(raw)["id"]) == (200, NAME)
    assert client.models.retrieve(NAME) == client.models.list().data[0]
    for name in ("gpt-5", "tiny/", "%ed%a0%bd", "..%2f..", "a" * 3000):
        status, _, raw = post(server, f"/v1/models/{name}", None)
        assert (status, json.loads(raw)["error"]["code"]) == (404, "model_not_found")
    assert post(server, f"/v1/models/{NAME}", None, key=None)[0] == 401


def test_clients_get_several_answers_with_probabilities(client):
    answer = complete(client, list(SENTENCES[:2]), n=2, logprobs=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.token_logprobs) == 5 for choice in answer.choices)
    assert answer.usage.completion_tokens == 20
    chat = talk(client, "Hello", n=2, logprobs=True, top_logprobs=2, max_tokens=5)
    assert [len(choice.logprobs.content[0].top_logprobs) for choice in chat.choices] == [2, 2]
    options = {"n": 2, "logprobs": True, "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = talk(client, "Hello", **options)
    for index in (0, 1):
        deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(delta or "" for delta in deltas) == chat.choices[index].message.content
    assert (last.choices, last.usage) == ([], chat.usage)
    extra = {"repetition_penalty": 1.3, "min_p": 0.1, "top_k": 5}
    assert complete(client, "Once", max_tokens=5, echo=True, extra_body=extra).choices[0].text.startswith("Once")


def test_the_most_answers_of_one_request_are_all_given(client, goes_on):
    prompts = [f"{at}" for at in range(MOST_ANSWERS)]
    answer = complete(client, prompts, max_tokens=1, logit_bias={"0": -100})
    assert [choice.index for choice in answer.choices] == list(range(MOST_ANSWERS))
    assert answer.choices[7].text == complete(client, "7", max_tokens=1, logit_bias={"0": -100}).choices[0].text


def test_large_prompts_are_refused_at_once_by_their_bytes_and_others_go_on(server, client, goes_on):
    expected = complete(client, SENTENCES[0], max_tokens=8)
    texts = ["a b " * 250_000] * 32 + ["a b " * 7_750_000]

    def refused(text: str) -> int:
        with pytest.raises(openai.BadRequestError) as caught:
            (talk if len(text) % 3 else complete)(client, text)
        assert caught.value.code == "context_length_exceeded"
        return caught.value.status_code

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(refused, texts)
        assert complete(client, SENTENCES[0], max_tokens=8).choices == expected.choices
        assert server.health()["status"] == "ok"
        assert set(answers) == {400}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"model": "tiny", "prompt": "a", "\\ud83e": 1}',
        b'{"model": "\\ud83e", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "\\ud83e"}',
        b'{"model": "tiny", "prompt": "a", "stop": "\\ud83e"}',
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 400 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * 90_000,
        b'{"model": "tiny", "model": "tiny", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "n": 0}',
        b'{"model": "tiny", "prompt": "\xff"}',
    ],
    ids=range(13),
)
def test_a_body_of_odd_values_is_the_clients_error(server, goes_on, body):
    status, _, raw = post(server, "/v1/completions", body)
    assert status in (400, 404)
    assert len(raw) < 2000
    assert json.loads(raw)["error"]["type"] == "invalid_request_error"
    assert "Traceback" not in server.errors()


def sent(server: Served, data: bytes) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(data)
    return connection


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_at_any_time_leaves_nothing_in_the_log(server, goes_on, stream, reset):
    body = json.dumps(
        {"model": NAME, "prompt": "Once", "max_tokens": 4000, "stream": stream, "logit_bias": {"0": -100}}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    for end in (len(head) // 2, len(head), len(head) + 20, len(whole)):
        connection = sent(server, whole[:end])
        if end == len(whole):
            while not server.health()["requests"]:
                pass
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert server.becomes_free(3)
    assert "Traceback" not in server.errors()
    assert "ERROR" not in server.errors()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: evil.com\r\n", 403),
        ("Host: localhost.evil.com\r\n", 403),
        ("Host: evil.com\r\nX-Forwarded-Host: localhost\r\n", 403),
        ("Host: user@localhost\r\n", 403),
        ("", 400),
        ("Host: localhost\r\nHost: evil.com\r\n", 400),
        ("Host: localhost\r\nOrigin: http://evil.com\r\n", 403),
        ("Host: LOCALHOST.:1\r\n", 200),
        ("Host: models.example.org\r\nOrigin: https://models.example.org\r\n", 200),
        ("Host: localhost\r\nX-Forwarded-Host: evil.com\r\n", 200),
    ],
)
def test_only_a_page_of_this_machine_or_one_that_is_allowed_may_ask(server, headers, status):
    with sent(server, f"GET /health HTTP/1.1\r\n{headers}Connection: close\r\n\r\n".encode()) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert int(answer.split()[1]) == status
    assert status != 403 or b'"invalid_request_error"' in answer


def post(
    server: Served, path: str, body: bytes | None, key: str | None = KEY, kind: str = "application/json"
) -> tuple[int, Any, bytes]:
    headers = {"content-type": kind} | ({} if key is None else {"authorization": key})
    if key == KEY:
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(server.address + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "\xe9"]
)
def test_a_wrong_key_is_refused_before_anything_else(server, goes_on, key):
    for path, body in (("/v1/completions", b"{"), ("/v1/chat/completions", b"{"), ("/v1/models", None)):
        status, headers, raw = post(server, path, body, key)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(raw)["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        complete(server.client(key="wrong"), "Once")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": [}', 400),
        ("/v1/completions", b"[1]", 400),
        ("/v1/completions", b"\xff\xfe", 400),
        ("/v1/completions", b'"' + b"x" * 33 * 2**20 + b'"', 413),
        ("/v1/completions", None, 405),
        ("/v1/embeddings", b"{}", 404),
        ("/load_model", b'{"model": "/etc"}', 404),
        ("/reset", b"", 404),
        ("/docs", None, 404),
    ],
)
def test_what_is_no_request_is_an_error_in_openais_words(server, goes_on, path, body, status):
    got, _, raw = post(server, path, body)
    assert got == status
    error = json.loads(raw)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]


def test_only_json_is_taken_which_no_foreign_page_can_send_unasked(server, goes_on):
    body = json.dumps({"model": NAME, "prompt": "Once", "max_tokens": 1}).encode()
    for kind, status in (("text/plain", 415), ("Application/JSON; charset=utf-8", 200)):
        assert post(server, "/v1/completions", body, kind=kind)[0] == status


def assert_a_signal_ends_it(served: Served, sent: signal.Signals, status: int, model: str) -> None:
    stream = complete(served.client(), SENTENCES[0], model=model, max_tokens=4000, stream=True, logit_bias={"0": -100})
    next(stream)
    told, before = time.monotonic(), served.errors()
    assert f"serving {model!r}" in before
    served.process.send_signal(sent)
    with pytest.raises(openai.APIError):
        list(stream)
    assert served.process.wait(timeout=20) == status
    assert time.monotonic() - told < 4
    # It ends without a word.
    assert served.errors() == before


def test_another_variant_is_served_by_another_name_and_ctrl_c_ends_the_server_with_its_streams(tmp_path):
    folder = write_model(tmp_path / NAME, "diff_v2", template=False)
    with running(folder, "--model-name", "other", key=None) as served:
        client = served.client()
        alone = Alone(served)
        for prompt in SENTENCES[:2]:
            assert complete(client, prompt, max_tokens=30, model="other").choices[0].text == alone.text(prompt, 30)
        with pytest.raises(openai.BadRequestError, match="chat template"):
            talk(client, "Hello", model="other")
        assert_a_signal_ends_it(served, signal.SIGINT, 130, "other")


def test_sigterm_ends_the_server_with_its_streams(server):
    # The last test of this file: it ends the server that the others ask.
    assert_a_signal_ends_it(server, signal.SIGTERM, -signal.SIGTERM, NAME)
