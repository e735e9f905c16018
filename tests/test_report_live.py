"""The live page's server: this machine only, metrics.jsonl only, whatever state the file is in."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import pytest

from report.live import Metrics, make_server
from tests.test_report_run import a_run, write_run


@contextmanager
def served(*folders):
    """The port of a server of these runs."""
    with make_server(folders, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def ask(port, path="/data.json", host=None, method="GET"):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    result = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return result


def data(port):
    return json.loads(ask(port)[2])


def test_the_page_and_its_data(tmp_path):
    folder = a_run(tmp_path / "run")
    with served(folder) as port:
        status, headers, body = ask(port, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff" and b"connect-src &#39;self&#39;" in body
        (run,) = data(port)["runs"]
        assert run["label"] == "run" and run["path"] == str(folder)
        assert run["curves"]["val_loss"]["y"] == [4.0, 4.1, 4.2] and ["steps", "6"] in run["facts"]
        assert ask(port, "/", method="HEAD")[2] == b""
        for path in ("/config.yaml", "/../metrics.jsonl", "/data.json?x=1", "/favicon.ico"):
            assert ask(port, path)[0] == 404
        assert ask(port, "/", method="POST")[0] == 501


def test_other_names_for_this_machine_are_refused(tmp_path):
    with served(a_run(tmp_path / "run")) as port:
        assert ask(port, host=f"localhost:{port}")[0] == 200
        for host in (
            "example.org",
            f"example.org:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port + 1}",
            f"127.0.0.1:{port}.org",
        ):
            status, _, body = ask(port, host=host)
            assert status == 403 and b"steps" not in body, host
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        connection.sendall(b"GET /data.json HTTP/1.0\r\n\r\n")  # no Host at all
        assert b" 403 " in connection.recv(100)
        connection.close()


def test_it_listens_on_this_machine_alone(tmp_path):
    with make_server([a_run(tmp_path / "run")], 0) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_it_reads_metrics_and_nothing_else(tmp_path):
    folder = a_run(tmp_path / "run")
    for name in ("config.yaml", "samples.jsonl", "status.json", "training.log"):
        (folder / name).write_bytes(b"\xff not read")
    with served(folder) as port:
        assert len(data(port)["runs"][0]["curves"]["loss"]["x"]) == 6


def test_a_growing_file_is_followed_half_lines_left_out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with served(folder) as port:
        first = data(port)
        assert first["runs"][0]["facts"] == [["state", "no step is logged yet"]] and first["panels"] == []
        whole = b'{"step": 0, "loss": 3.0, "lr": 0.1}\n'
        for cut in range(1, len(whole) - 2):
            (folder / "metrics.jsonl").write_bytes(whole[:cut])
            assert data(port)["panels"] == [], cut
        (folder / "metrics.jsonl").write_bytes(whole + whole[:-9].replace(b"0", b"1", 1))
        second = data(port)
        assert second["runs"][0]["curves"]["loss"]["x"] == [0] and second["version"] != first["version"]
        assert data(port) == second  # nothing new: the same version
        (folder / "metrics.jsonl").write_bytes(b'{"step": 0}\nbroken\n{"step": 1}\n')
        assert "metrics.jsonl:2: not JSON" in data(port)["error"]
        (folder / "metrics.jsonl").write_bytes(whole * 1 + b'{"step": 1, "loss": 2.0}\n')
        assert data(port)["runs"][0]["curves"]["loss"]["y"] == [3.0, 2.0]


def test_a_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    metrics = Metrics([a_run(tmp_path / "run")])
    first = metrics.answer()
    monkeypatch.setattr("report.live.read_lines", lambda path: pytest.fail("read again"))
    assert metrics.answer() is first


def test_a_client_that_leaves_or_stays_silent_stops_nobody(tmp_path, capfd):
    with served(write_run(tmp_path / "run", 300)) as port:
        silent = socket.create_connection(("127.0.0.1", port))
        for _ in range(5):
            leaving = socket.create_connection(("127.0.0.1", port))
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a farewell
            leaving.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            leaving.close()
        assert ask(port)[0] == 200
        silent.close()
    assert capfd.readouterr().err == ""


def test_what_cannot_be_served_is_told(tmp_path):
    folder = a_run(tmp_path / "run")
    with make_server([folder], 0) as server, pytest.raises(ValueError, match=r"--port \d+: Address already in use"):
        make_server([folder], server.server_address[1])
    (tmp_path / "file").touch()
    for folders, port, message in (
        ([tmp_path / "none"], 0, "no such folder of a run"),
        ([tmp_path / "file"], 0, "is a file"),
        ([folder, folder], 0, "more than once"),
        ([folder], -1, "--port -1"),
        ([folder], 65536, "--port 65536"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make_server(folders, port)
