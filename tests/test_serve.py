"""The API of `sample.py --serve`: OpenAI's wire format, its refusals, its queue, and an end when nobody listens."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sample as script
from data.chat import render_conversation
from evaluation.compare import Sampling
from evaluation.settings import SampleSettings
from formats.open_model import open_model
from model.generate import generate
from serve.api import ApiError, read_request
from serve.chat import chat_page, open_talkers
from serve.server import MAX_BODY, ChatServer
from serve.talker import WAITING, Ending, Talker
from tests.scripts import one_line_error, run_main
from tests.tiny_checkpoints import save_tiny

SAMPLING = Sampling(max_new_tokens=12, temperature=0.0)
HELLO = [{"role": "user", "content": "Hi"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base without a template, a tuned one with one, both with room for 512 tokens."""
    root = tmp_path_factory.mktemp("models")
    base = save_tiny(root / "base.pt", seed=0, block_size=512)
    return str(base), str(save_tiny(root / "tuned.pt", seed=1, template="dolly", block_size=512))


@contextmanager
def served(talkers: list[Talker], sampling: Sampling = SAMPLING) -> Iterator[int]:
    """The port of a server."""
    with ChatServer(talkers, sampling, chat_page(talkers, sampling), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def talkers(models: tuple[str, str]) -> list[Talker]:
    return open_talkers(models)


@pytest.fixture(scope="module")
def port(talkers: list[Talker]) -> Iterator[int]:
    with served(talkers) as port:
        yield port


def ask(port: int, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, data, {**(JSON if body is not None else {}), **named})
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


def complete(port: int, model: Any = "tuned", **more: Any) -> dict[str, Any]:
    status, _, body = ask(port, "/v1/chat/completions", {"model": model, "messages": HELLO, **more})
    assert status == 200, body
    answer: dict[str, Any] = json.loads(body)
    return answer


def events(body: bytes) -> list[dict[str, Any]]:
    lines = body.decode("ascii").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])
    return [json.loads(line[6:]) for line in lines[:-2]]


def refused(port: int, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
    """(status, OpenAI's error object)."""
    status, head, answer = ask(port, path, body, **headers)
    assert head["Content-Type"] == "application/json"
    (error,) = json.loads(answer).values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return status, error


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_generate_whole_and_streamed(port: int, models: tuple[str, str]) -> None:
    opened = open_model(models[1])
    assert opened.template is not None
    ids, _ = render_conversation(HELLO, opened.template, opened.tokenizer, add_generation_prompt=True)
    (new,) = generate(opened.model, [ids], max_new_tokens=12, temperature=0.0, stop_ids=opened.stop_ids)
    whole = complete(port)
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": opened.tokenizer.decode(new), "refusal": None}
    assert whole["object"] == "chat.completion" and whole["model"] == "tuned" and choice["finish_reason"] == "length"
    assert whole["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12}
    asked = {"model": "tuned", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    status, head, body = ask(port, "/v1/chat/completions", asked)
    assert status == 200 and head["Content-Type"].startswith("text/event-stream")
    *chunks, last, usage = events(body)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == choice["message"]["content"]
    assert len(chunks) > 3 and chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (*chunks, last, usage)}) == 1 != whole["id"]


def test_sampling_is_what_was_asked_for(port: int) -> None:
    def text(**more: Any) -> str:
        return str(complete(port, temperature=1.5, **more)["choices"][0]["message"]["content"])

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, top_k=1) == text(seed=2, top_k=1) == complete(port)["choices"][0]["message"]["content"]
    assert text(seed=1, top_p=0) == text(seed=2, top_p=0)
    for name in ("max_tokens", "max_completion_tokens"):
        assert complete(port, **{name: 3})["usage"]["completion_tokens"] == 3
    full = complete(port)["choices"][0]["message"]["content"]
    stop = full[4:6]
    stopped = complete(port, stop=["never in it", stop])["choices"][0]
    assert stopped["message"]["content"] == full[: full.index(stop)] and stopped["finish_reason"] == "stop"
    assert complete(port, stop=stop)["choices"][0] == stopped


def test_a_model_without_a_template_borrows_the_others(port: int, talkers: list[Talker]) -> None:
    assert [talker.template.name for talker in talkers] == ["dolly", "dolly"]
    assert (
        complete(port, "base")["choices"][0]["message"]["content"] != complete(port)["choices"][0]["message"]["content"]
    )
    status, _, body = ask(port, "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(body)["data"]] == ["base", "tuned"]


def test_contents_in_parts_names_and_idle_fields(port: int) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    more = {"n": 1, "user": "me", "tools": [], "logprobs": False, "stop": None, "frequency_penalty": 0.0}
    answer = complete(port, messages=[{"role": "user", "content": parts, "name": "Ann"}], **more)
    assert answer["choices"] == complete(port)["choices"]
    assert complete(port, messages=[{"role": "user", "content": "\ud800 \x00"}])["choices"], (
        "half a character is replaced"
    )
    developer = complete(port, messages=[{"role": "developer", "content": "Be brief."}, *HELLO])
    assert (
        developer["choices"] == complete(port, messages=[{"role": "system", "content": "Be brief."}, *HELLO])["choices"]
    )


def test_an_answer_ends_with_the_context(port: int) -> None:
    long = [{"role": "user", "content": "x" * 440}]
    answer = complete(port, messages=long, max_tokens=10_000)
    assert answer["usage"]["total_tokens"] == 512 and answer["choices"][0]["finish_reason"] == "length"
    status, error = refused(port, {"model": "tuned", "messages": [{"role": "user", "content": "x" * 600}]})
    assert status == 400 and error["code"] == "context_length_exceeded" and "context is 512" in error["message"]


def test_the_openai_client(port: int) -> None:
    openai = pytest.importorskip("openai", reason="no openai here: the wire format is checked by hand only")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    whole = client.chat.completions.create(model="tuned", messages=HELLO, temperature=0, max_tokens=6, seed=3)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens == 6 and whole.choices[0].finish_reason == "length"
    asked = {"model": "tuned", "messages": HELLO, "temperature": 0, "max_tokens": 6, "extra_body": {"top_k": 1}}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == 6
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tuned", messages=HELLO, temperature=-1)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"model": 3}, "model", "expected the name"),
        ({"messages": []}, "messages", "an empty list"),
        ({"messages": "Hi"}, "messages", "expected a list"),
        ({"messages": [3]}, "messages", "found int"),
        ({"messages": [{"role": "user"}]}, "messages", "content"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "king"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text only"),
        ({"temperature": -1}, "temperature", "out of range"),
        ({"temperature": float("nan")}, "temperature", "out of range"),
        ({"temperature": float("inf")}, "temperature", "out of range"),
        ({"temperature": "1"}, "temperature", "expected a number"),
        ({"temperature": True}, "temperature", "expected a number"),
        ({"top_p": 1.1}, "top_p", "out of range"),
        ({"top_k": 1.5}, "top_k", "expected a whole number"),
        ({"max_tokens": 0}, "max_tokens", "out of range"),
        ({"max_tokens": 1 << 40}, "max_tokens", "out of range"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"seed": 0.5}, "seed", "expected a whole number"),
        ({"stop": [""]}, "stop", "1 to 200"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": 3}, "stop", "expected a text"),
        ({"stream": 1}, "stream", "expected bool"),
        ({"n": 2}, "n", "not supported"),
        ({"tools": [{}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"temprature": 1}, "temprature", "Did you mean temperature?"),
    ],
)
def test_a_field_that_is_wrong_is_named(change: dict[str, Any], param: str, says: str, port: int) -> None:
    status, error = refused(port, {"model": "tuned", "messages": HELLO, **change})
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and says in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_request(body: bytes, port: int) -> None:
    assert refused(port, body)[0] == 400


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["model", "messages", "role", "content", "stop", "n", "stream", "seed", "type", "text"]
                ),
                inner,
            )
        ),
    )
)
def test_whatever_json_it_is_it_is_read_or_refused(value: Any) -> None:
    try:
        read_request(json.dumps(value).encode(), SAMPLING)
    except ApiError as error:
        assert 400 <= error.status < 500


def test_other_names_and_other_pages_are_refused(port: int) -> None:
    for path, body in (
        ("/", None),
        ("/v1/models", None),
        ("/v1/chat/completions", {"model": "tuned", "messages": HELLO}),
    ):
        for headers in (
            {"Host": "evil.example"},
            {"Host": f"evil.example:{port}"},
            {"Host": "127.0.0.1"},
            {"Host": f"127.0.0.1:{port + 1}"},
            {"Origin": "http://evil.example"},
            {"Origin": f"https://127.0.0.1:{port}"},
            {"Origin": f"http://127.0.0.1:{port + 1}"},
            {"Origin": "null"},
        ):
            status, _, answer = ask(port, path, body, **headers)
            assert status == 403 and b"choices" not in answer and b"<html" not in answer, headers
        for headers in ({"Host": f"localhost:{port}"}, {"Origin": f"http://127.0.0.1:{port}"}):
            assert ask(port, path, body, **headers)[0] == 200
    raw = socket.create_connection(("127.0.0.1", port), timeout=20)
    raw.sendall(b"GET / HTTP/1.0\r\n\r\n")  # no Host at all
    assert b" 403 " in raw.recv(100)
    raw.close()


def test_sizes_kinds_and_paths(port: int) -> None:
    body = {"model": "tuned", "messages": HELLO}
    assert refused(port, b" " * (MAX_BODY + 1))[0] == 413
    assert refused(port, body, Content_Length="9" * 30)[0] == 413
    assert refused(port, body, Content_Length="-1")[0] == 411
    assert refused(port, body, Content_Type="text/plain")[0] == 415, "what a form elsewhere can send"
    assert refused(port, body, "/v1/completions")[0] == 404
    assert refused(port, body, "/")[0] == 405
    assert refused(port, None, "/v1/chat/completions")[0] == 405
    for path in ("/favicon.ico", "/../sample.py", "/v1/models/x", "/?x=1"):
        assert refused(port, None, path)[0] == 404
    assert refused(port, {**body, "model": "gpt-4"})[1]["code"] == "model_not_found"


def test_it_listens_on_this_machine_alone_and_its_page_may_be_framed_by_none(talkers: list[Talker], port: int) -> None:
    with ChatServer(talkers, SAMPLING, "", 0) as server:
        assert server.server_address[0] == "127.0.0.1"
    _, head, body = ask(port, "/")
    assert head["X-Frame-Options"] == "DENY" and head["Cache-Control"] == "no-store"
    assert b"default-src &#39;none&#39;" in body and b"connect-src &#39;self&#39;" in body and b"unsafe" not in body
    with pytest.raises(ValueError, match="--port 70000"):
        ChatServer(talkers, SAMPLING, "", 70000)
    with pytest.raises(ValueError, match=f"--port {port}: .*choose another"):
        ChatServer(talkers, SAMPLING, "", port)


# -- the queue and clients that leave ----------------------------------------------------------------------------------


class Slow:
    """Stands for `stream`: tokens as long as they are let, and whether it was closed."""

    def __init__(self) -> None:
        self.go, self.begun, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.at_once, self.most = 0, 0

    def __call__(self, model: Any, prompt: Any, **how: Any) -> Iterator[int]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            for _ in range(how["max_new_tokens"]):
                self.begun.set()
                yield 65
                time.sleep(0.02 if not self.go.is_set() else 0)
        finally:
            self.at_once -= 1
            self.closed.set()


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    with mock.patch("serve.talker.stream", slow):
        yield slow
        slow.go.set()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_model_stops_when_its_client_leaves(streamed: bool, port: int, slow: Slow) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"model": "tuned", "messages": HELLO, "max_tokens": 400, "stream": streamed}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
    assert slow.begun.wait(20)
    if streamed:
        answer = connection.getresponse()
        assert answer.read(10)
        answer.close()
    connection.close()
    assert slow.closed.wait(3), "400 tokens would take 8 s"
    slow.go.set()
    assert complete(port, max_tokens=2)["choices"][0]["message"]["content"] == "AA", "the next one gets the model"


def test_one_answer_at_a_time_and_a_bounded_queue(port: int, talkers: list[Talker], slow: Slow) -> None:
    answers: list[int] = []
    body = {"model": "tuned", "messages": HELLO, "max_tokens": 400}
    threads = [
        threading.Thread(target=lambda: answers.append(ask(port, "/v1/chat/completions", body)[0]))
        for _ in range(WAITING + 1)
    ]
    for thread in threads:
        thread.start()
        assert slow.begun.wait(20)
    deadline = time.monotonic() + 20
    while talkers[1]._waiting < WAITING:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status, head, answer = ask(port, "/v1/chat/completions", body)
    assert status == 429 and head["Retry-After"] == "1" and json.loads(answer)["error"]["code"] == "queue_full"
    slow.go.set()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * (WAITING + 1) and slow.most == 1


def test_a_model_that_breaks_says_so(port: int) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[int]:
        yield 65
        raise ValueError("the model's logits are not finite")

    with mock.patch("serve.talker.stream", broken):
        status, error = refused(port, {"model": "tuned", "messages": HELLO})
        assert status == 500 and error["type"] == "server_error" and "not finite" in error["message"]
        body = {"model": "tuned", "messages": HELLO, "stream": True}
        _, _, answer = ask(port, "/v1/chat/completions", body)
        assert b"not finite" in answer and b"DONE" not in answer


# -- where an answer ends ----------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab.", max_size=4)),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
    st.sampled_from(["", ".", "a."]),
)
def test_a_stop_is_found_however_the_text_is_cut(texts: list[str], stops: list[str], end: str) -> None:
    ending = Ending(stops, end)
    whole = "".join(texts)
    places = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(places)] if places else whole.removesuffix(end)
    got = list(ending.cut(texts))
    assert "".join(got) == expected and all(got)
    assert ending.stopped == bool(places)


def test_nothing_is_held_back_without_need() -> None:
    ending = Ending(["stop"])
    pieces = ending.cut(iter(["a", "b st", "x", "stop", "never read"]))
    assert [next(pieces), next(pieces), next(pieces)] == ["a", "b ", "stx"]
    assert list(pieces) == []


# -- the script --------------------------------------------------------------------------------------------------------


def test_the_script_refuses_what_does_not_go_together(
    models: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*words: object) -> str:
        return one_line_error(run_main(capsys, script.main, SampleSettings, "--serve", "--device", "cpu", *words))

    base, tuned = models
    assert "one model, or two" in error()
    assert "one model, or two" in error("--checkpoints", base, tuned, tuned)
    assert "--prompt does not go with it" in error("--checkpoints", tuned, "--prompt", "Hi")
    assert "--chat does not go with it" in error("--checkpoints", tuned, "--chat")
    assert "needs a prompt template: name one with --prompt_template" in error("--checkpoints", base)
    assert "--port -1" in error("--checkpoints", tuned, "--port", -1)
    assert "nowhere.pt" in error("--checkpoints", "nowhere.pt")


def test_the_script_serves_until_ctrl_c(models: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(ChatServer, "serve_forever", side_effect=KeyboardInterrupt):
        code, out, _ = run_main(
            capsys, script.main, SampleSettings, "--serve", "--port", 0, "--checkpoints", *models, "--device", "cpu"
        )
    assert code == 0 and out.startswith("Chat: http://127.0.0.1:") and "/v1  (Ctrl+C ends it)" in out
