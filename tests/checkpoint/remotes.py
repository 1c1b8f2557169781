"""What tests of remotes need: checkpoints to send, an S3 server to send them to, and a proxy that breaks the way there."""

import contextlib
import http.client
import http.server
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainkit.checkpoint import files
from trainkit.checkpoint.manifest import NAME, Manifest
from trainkit.checkpoint.remote import Remote

BUCKET = "mirrors"
RUN_YAML = "name: t\nsteps: 6\n"


def saved(step: int, run: Path = Path("runs/t"), size: int = 3000, **more: bytes | None) -> Path:
    """A committed checkpoint, a function of the step and of `more`, of which None leaves a file out."""
    folder = run / "checkpoints" / f"step-{step:010d}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (run / "run.yaml").write_text(RUN_YAML)
    content: dict[str, bytes | None] = {
        "shard-00000-of-00001.safetensors": bytes((i * i + step) % 251 for i in range(size)),
        "train_state.json": b"{}",
        "run.yaml": RUN_YAML.encode(),
        **more,
    }
    written = {name: files.write(folder / name, [data]) for name, data in content.items() if data is not None}
    manifest = Manifest(run.name, step, 1.0, {"trainkit": "0"}, {"metric": None}, written, {})
    files.write(folder / NAME, [manifest.encode()])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def empty_memory() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def at(step: int, name: str = "") -> str:
    return f"t/checkpoints/step-{step:010d}/{name}"


def change(remote: Remote, path: str, how: Callable[[bytes], bytes]) -> None:
    fs, place = remote._storage._fs, remote._storage._at(path)
    fs.pipe_file(place, how(fs.cat_file(place)))


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def fetched(remote: Remote, step: int | None = None, notes: list[str] | None = None) -> Path:
    return remote.download("t", step, Path("here"), (notes if notes is not None else []).append)


class Server:
    """moto's S3, which forgets everything when it is killed with `lose`."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer
        from werkzeug.serving import BaseWSGIServer

        BaseWSGIServer.serve_forever.__defaults__ = (0.02,)  # within which it notices that it is to stop; 0.5 by itself
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._make = ThreadedMotoServer
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port: int = self._server.get_host_and_port()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str) -> None:
        """Make a bucket, or forget everything."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path)
        assert connection.getresponse().status == 200
        connection.close()

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server = self._make("127.0.0.1", self.port, verbose=False)
        self._server.start()


class Proxy:
    """An HTTP proxy before a server. From request `first` on it fails `count` requests as `fault` says:

    drop: the connection ends before the server hears of it; lost: the server has done it and the answer is lost;
    busy: 503 SlowDown; torn: half of the answer comes, then the connection ends. `act` is called at request `first`.
    """

    def __init__(self, port: int) -> None:
        self.backend, self.requests = port, 0
        self.first, self.count, self.fault = 0, 0, ""
        self.act: Callable[[], None] | None = None
        self.log: list[str] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = 1 << 16

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):  # a client that goes away is what is tested here
                    super().handle_one_request()

            def handle_expect_100(self) -> bool:
                go_on = super().handle_expect_100()
                self.wfile.flush()
                return go_on

            def answer(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def break_at(self, first: int, fault: str, count: int = 1 << 30, act: Callable[[], None] | None = None) -> None:
        with self._lock:
            self.requests, self.first, self.count, self.fault, self.act = 0, first, count, fault, act
            self.log.clear()

    def heal(self) -> None:
        self.break_at(0, "", 0)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        body = _body(request)
        with self._lock:
            self.requests += 1
            self.log.append(f"{request.command} {request.path}")
            number, act = self.requests, self.act if self.requests == self.first else None
            fault = self.fault if self.first <= number < self.first + self.count else ""
        if act is not None:
            act()
        if fault == "drop":
            request.close_connection = True
            return
        if fault == "busy":
            self._send(request, 503, [], b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.backend, timeout=10)
        try:
            connection.request(request.command, request.path, body, dict(request.headers))
            answer = connection.getresponse()
            data = answer.read()
        except OSError:
            request.close_connection = True
            return
        finally:
            connection.close()
        if fault == "lost":
            request.close_connection = True
            return
        self._send(request, answer.status, answer.getheaders(), data, torn=fault == "torn")

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: list[tuple[str, str]],
        data: bytes,
        torn: bool = False,
    ) -> None:
        request.send_response_only(status)
        kept = [(k, v) for k, v in headers if k.lower() not in ("connection", "transfer-encoding", "content-length")]
        length = {k.lower(): v for k, v in headers}.get("content-length", str(len(data)))
        for name, value in [*kept, ("Content-Length", length)]:
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data[: len(data) // 2] if torn else data)
        request.wfile.flush()
        if torn:
            request.close_connection = True


def _body(request: http.server.BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", "0")))
    parts = []
    del request.headers["Transfer-Encoding"]
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


@contextlib.contextmanager
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Proxy]]:
    """A server with a bucket, and a proxy that AWS's variables point to. No fault is hidden by a library's own retries."""
    pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")
    pytest.importorskip("s3fs", reason="needs s3fs: pip install 'trainkit[remote]'")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = Server()
    proxy = Proxy(server.port)
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainkit.checkpoint.storage.TRIES", 1)
    try:
        yield server, proxy
    finally:
        proxy.close()
        server.ask("POST", "/moto-api/reset")
        server.stop()
