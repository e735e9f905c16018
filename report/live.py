"""The run page while runs go on: a server on this machine alone, which reads metrics.jsonl and nothing else.

Training knows nothing of it: it may be started, stopped and asked at any time, and needs no more than the file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from report.page import show_controls
from report.records import read_lines
from report.run import live_data, live_page, run_labels

ADDRESS = "127.0.0.1"
HTML = "text/html; charset=utf-8"
PATIENCE = 10.0  # seconds that a silent client is waited for


class Metrics:
    """The metrics of several runs, read anew only when a file has changed."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        """Raises ValueError or OSError where a folder is none; its metrics.jsonl may come later."""
        for folder in map(Path, folders):
            if folder.is_file():
                raise ValueError(f"{folder}: is a file, expected the folder of a run")
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder of a run; start the run first")
        self.folders = [str(folder) for folder in folders]
        self.labels = run_labels(self.folders)
        self._lock = threading.Lock()  # each request has a thread of its own
        self._seen: Any = None
        self._answer = b""

    def answer(self) -> bytes:
        """The JSON that the page asks for: `live_data`, or {"error"} for a file that is broken."""
        paths = [Path(folder) / "metrics.jsonl" for folder in self.folders]
        with self._lock:
            try:
                seen = [(path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None for path in paths]
                if seen != self._seen:
                    self._answer, self._seen = self._read(paths), seen
            except (ValueError, OSError) as error:
                return json.dumps({"error": str(error)}).encode()
            return self._answer

    def _read(self, paths: Sequence[Path]) -> bytes:
        records = [read_lines(path) if path.exists() else [] for path in paths]
        data = live_data(list(zip(self.labels, records)))
        for run, folder in zip(data["runs"], self.folders):
            run["path"] = show_controls(folder)
        body = json.dumps(data, allow_nan=False)
        return json.dumps({**data, "version": hashlib.sha256(body.encode()).hexdigest()[:16]}).encode()


def make_server(folders: Sequence[str | Path], port: int) -> ThreadingHTTPServer:
    """A server of the live page, bound but not serving yet; `port` 0 takes a free one. Raises ValueError or OSError."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: expected 0 (any free one) to 65535")
    metrics = Metrics(folders)
    page = live_page(", ".join(metrics.labels)).encode("utf-8", errors="replace")
    content = {"/": (HTML, lambda: page), "/data.json": ("application/json", metrics.answer)}
    try:
        return _Server((ADDRESS, port), _handler(content))
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; choose another, or 0 for any free one") from None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def _handler(content: dict[str, tuple[str, Callable[[], bytes]]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE
        server_version, sys_version = "espalier", ""

        def do_GET(self) -> None:
            # A page elsewhere can make its own name point here; the Host header then still tells that name.
            port = cast(ThreadingHTTPServer, self.server).server_port
            if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
                self._send(HTTPStatus.FORBIDDEN, "text/plain", b"asked for under another name than 127.0.0.1\n")
            elif self.path not in content:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")
            else:
                kind, body = content[self.path]
                self._send(HTTPStatus.OK, kind, body())

        do_HEAD = do_GET

        def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A line for each poll would bury what the terminal says."""

    return Handler


def serve_runs(folders: Sequence[str | Path], port: int, say: Callable[[str], None] = print) -> None:
    """Shows the runs until Ctrl+C. Raises ValueError or OSError where it cannot start."""
    with make_server(folders, port) as server:
        say(f"http://{ADDRESS}:{server.server_address[1]}/  (Ctrl+C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
