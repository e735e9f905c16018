"""The server of the chat page and of `/v1/chat/completions`: on this machine alone, for its page and local programs.

A page elsewhere must not talk to it: its Host and Origin are refused, and so is what a form could send. A body is
bounded before it is read, a silent client is left, and a model that nobody listens to stops.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from evaluation.compare import Sampling
from serve.api import ApiError, ChatRequest, Reply, model_list, read_request
from serve.talker import Answer, Gone, Talker

ADDRESS = "127.0.0.1"
MAX_BODY = 1 << 20  # bytes; a context of 100,000 tokens fits
PATIENCE = 10.0  # seconds that a silent client is waited for
HTML, JSON, EVENTS = "text/html; charset=utf-8", "application/json", "text/event-stream; charset=utf-8"
COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"


class ChatServer(ThreadingHTTPServer):
    """Bound, but not serving yet; `port` 0 takes a free one. Raises ValueError where it cannot be had."""

    daemon_threads = True  # Ctrl+C does not wait for answers

    def __init__(self, talkers: Sequence[Talker], sampling: Sampling, page: str, port: int) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"--port {port}: expected 0 (any free one) to 65535")
        self.talkers = {talker.name: talker for talker in talkers}
        self.sampling, self.page = sampling, page.encode("utf-8", errors="replace")
        self.started, self.numbers = int(time.time()), itertools.count(1)
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise ValueError(f"--port {port}: {error.strerror}; choose another, or 0 for any free one") from None

    @property
    def names(self) -> tuple[str, str]:
        """What this server is called by those who may ask it."""
        return f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = PATIENCE
    server_version, sys_version = "espalier", ""

    @property
    def chat(self) -> ChatServer:
        return cast(ChatServer, self.server)

    def do_GET(self) -> None:
        """The page, or the list of models."""
        self._answer({"/": self._page, MODELS: self._models}, "GET")

    def do_POST(self) -> None:
        """A completion."""
        self._answer({COMPLETIONS: self._completion}, "POST")

    def _answer(self, pages: dict[str, Callable[[], None]], method: str) -> None:
        try:
            self._check_sender()
            if self.path not in pages:
                known = self.path in ("/", MODELS, COMPLETIONS)
                status = HTTPStatus.METHOD_NOT_ALLOWED if known else HTTPStatus.NOT_FOUND
                raise ApiError(f"{method} {self.path[:60]}: nothing is here", status)
            pages[self.path]()
        except ApiError as error:
            self._send(error.status, JSON, json.dumps(error.body).encode())
            if method == "POST":
                self._drain()
        except Gone:
            pass

    def _check_sender(self) -> None:
        """A page elsewhere can make its own name point here: the Host header then still tells that name."""
        names = self.chat.names
        if self.headers.get("Host") not in names:
            raise ApiError("asked for under another name than 127.0.0.1", HTTPStatus.FORBIDDEN)
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{name}" for name in names]:
            raise ApiError("asked by a page from elsewhere", HTTPStatus.FORBIDDEN)

    def _page(self) -> None:
        self._send(HTTPStatus.OK, HTML, self.chat.page)

    def _models(self) -> None:
        body = model_list(list(self.chat.talkers), self.chat.started)
        self._send(HTTPStatus.OK, JSON, json.dumps(body).encode())

    # -- completions -------------------------------------------------------------------------------------------------

    def _completion(self) -> None:
        request = read_request(self._body(), self.chat.sampling)
        talker = self.chat.talkers.get(request.model)
        if talker is None:
            raise ApiError(
                f"no model {request.model!r:.80} here, see /v1/models",
                HTTPStatus.NOT_FOUND,
                param="model",
                code="model_not_found",
            )
        answer = talker.answer(talker.prompt(request.messages), request.sampling, request.stop, self._gone)
        reply = Reply(next(self.chat.numbers), talker.name)
        try:
            if request.stream:
                self._stream(request, answer, reply)
            else:
                text = "".join(answer)
                body = reply.whole(text, answer.finish, answer.usage())
                self._send(HTTPStatus.OK, JSON, json.dumps(body).encode())
        except ValueError as error:  # of the model: its logits are not finite
            raise ApiError(str(error), HTTPStatus.INTERNAL_SERVER_ERROR, kind="server_error") from None

    def _stream(self, request: ChatRequest, answer: Answer, reply: Reply) -> None:
        """Server-sent events. The first piece is awaited before the status is sent: until then all may be refused."""
        with contextlib.closing(iter(answer)) as pieces:  # type: ignore[type-var]  # a generator, which holds the model
            first = next(pieces, "")
            self._head(HTTPStatus.OK, EVENTS)
            self._event(reply.chunk({"role": "assistant", "content": first}))
            try:
                for piece in pieces:
                    self._event(reply.chunk({"content": piece}))
            except ValueError as error:  # too late for a status
                self._event(ApiError(str(error), kind="server_error").body)
                return
        self._event(reply.chunk({}, answer.finish))
        if request.include_usage:
            self._event(reply.usage(answer.usage()))
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")  # pure ASCII: no line ends in it
        self.wfile.flush()

    def _body(self) -> bytes:
        """The request's body. Raises ApiError before reading what is too long, or what a form could have sent."""
        if self.headers.get_content_type() != JSON:
            raise ApiError(f"expected Content-Type: {JSON}", HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise ApiError("expected a Content-Length", HTTPStatus.LENGTH_REQUIRED)
        if len(length) > 12 or int(length) > MAX_BODY:
            raise ApiError(f"a body of more than {MAX_BODY} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Gone from None
        if len(body) < int(length):
            raise Gone
        return body

    def _drain(self) -> None:
        """Read what a refused client still sends: closed before that, it would see a reset in place of the answer."""
        self.connection.settimeout(0.5)
        left = MAX_BODY
        with contextlib.suppress(OSError):
            while left > 0 and (data := self.rfile.read1(min(left, 1 << 16))):
                left -= len(data)

    def _gone(self) -> bool:
        """Whether the client closed its end: then there is something to read, and it is nothing."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):
            return True

    # -- what is sent ------------------------------------------------------------------------------------------------

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            **({} if length is None else {"Content-Length": str(length)}),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
        }
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            headers["Retry-After"] = "1"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """A line for each request would tell the terminal what was asked."""
