"""A real S3 server on loopback, and everything that can happen on the way to it."""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.remotes import BUCKET, Proxy, Server, content, s3, saved
from trainkit.checkpoint import storage
from trainkit.checkpoint.mirror import Mirror
from trainkit.checkpoint.remote import Remote
from trainkit.checkpoint.storage import RemoteError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # botocore's and moto's own
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # of connections that are broken on purpose
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
URL = f"s3://{BUCKET}/p"
PATIENCE_S = 30.0
FAST = (0.01, 0.05)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Proxy]]:
    with pytest.MonkeyPatch.context() as patch, s3(patch) as both:
        yield both


@pytest.fixture
def server(servers: tuple[Server, Proxy]) -> Server:
    servers[0].ask("POST", "/moto-api/reset")
    servers[0].ask("PUT", f"/{BUCKET}")
    return servers[0]


@pytest.fixture
def proxy(servers: tuple[Server, Proxy], server: Server) -> Proxy:
    servers[1].heal()
    return servers[1]


def mirror(notes: list[str], url: str = URL) -> Mirror:
    Path("runs/t").mkdir(parents=True, exist_ok=True)
    return Mirror(url, Path("runs/t"), notes.append, differs=lambda a, b: [] if a == b else ["x"], backoff_s=FAST)


def until(happened: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_there_and_back(proxy: Proxy) -> None:
    remote, folders = Remote(URL), [saved(1), saved(2, empty=b"")]
    for folder in folders:
        remote.upload(folder)
    assert list(remote.checkpoints("t")) == [1, 2]
    assert remote.runs() == ["t"]
    assert content(remote.download("t", None, Path("here"), print)) == content(folders[1])
    proxy.heal()
    remote.upload(folders[1])
    assert proxy.requests == 2  # what is there is listed, its manifest read, and nothing sent
    remote.remove("t", 2)
    assert remote.steps("t") == [1]


@pytest.mark.parametrize("fault", ["drop", "busy", "lost", "torn"])
def test_a_fault_at_every_request_of_an_upload(proxy: Proxy, fault: str) -> None:
    remote = Remote(URL)
    remote.upload(saved(0, size=100))
    for number in itertools.count(1):
        new = saved(number, size=100, **{"run.yaml": None})
        proxy.break_at(number, fault)
        try:
            remote.upload(new)
            failed = False
        except RemoteError:
            failed = True
        reached = proxy.requests >= number
        proxy.heal()
        newest = remote.newest("t")
        assert newest in (number - 1, number)
        assert failed or newest == number
        if newest == number:
            assert content(remote.download("t", number, Path("here"), print)) == content(new)
        remote.upload(new)
        assert remote.newest("t") == number
        if not reached:
            break
    assert number > 11
    assert content(remote.download("t", None, Path("there"), print)) == content(new)


@pytest.mark.parametrize(("number", "fault"), [(1, "drop"), (5, "busy"), (9, "lost"), (14, "drop")])
def test_the_mirror_catches_up_after_a_fault(proxy: Proxy, number: int, fault: str) -> None:
    notes: list[str] = []
    it, new = mirror(notes), saved(2)
    proxy.break_at(number, fault, count=2)
    it.submit(new)
    until(lambda: it.state["uploaded_step"] == 2)
    it.close(PATIENCE_S)
    assert [note.split(" ")[0] for note in notes] == ["warning:", "the"]
    assert content(Remote(URL).download("t", None, Path("here"), print)) == content(new)


def test_a_server_that_comes_up_later(proxy: Proxy, server: Server) -> None:
    notes: list[str] = []
    server.stop()
    it, new = mirror(notes), saved(5)
    it.submit(new)
    until(lambda: it.state["problem"])
    it.submit(newer := saved(6))
    assert new.exists()
    server.start()
    until(lambda: it.state["uploaded_step"] == 6)
    it.close(PATIENCE_S)
    assert len(notes) == 2
    assert content(Remote(URL).download("t", None, Path("here"), print)) == content(newer)


def test_a_server_that_is_gone_at_every_request_of_an_upload(proxy: Proxy, server: Server) -> None:
    """No half checkpoint is ever listed, and when it is there again the mirror catches up by itself."""
    notes: list[str] = []
    it = mirror(notes)
    for number in itertools.count(1):
        new = saved(number, size=100)
        proxy.break_at(number, "", act=server.stop)
        it.submit(new)
        until(lambda number=number: it.state["problem"] or it.state["uploaded_step"] == number)
        reached = proxy.requests >= number
        proxy.heal()
        if reached:
            server.start()
        there = list(Remote(URL).checkpoints("t"))
        assert there in ([*range(1, number)], [*range(1, number + 1)]), number
        until(lambda number=number: it.state["uploaded_step"] == number)
        assert content(Remote(URL).download("t", number, Path("here"), print)) == content(new)
        if not reached:
            break
    it.close(PATIENCE_S)
    assert number > 11


def test_a_server_that_is_killed_with_all_that_it_holds(proxy: Proxy) -> None:
    """A process of its own, that has everything in memory."""
    command, home = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"], proxy.backend
    with socket.create_server(("127.0.0.1", 0)) as free:
        proxy.backend = free.getsockname()[1]
    processes = [start(command, proxy.backend)]
    notes: list[str] = []
    it = mirror(notes)
    try:
        for step, number in ((1, 9), (2, 6)):
            proxy.break_at(number, "", act=lambda: processes[-1].kill())
            it.submit(saved(step))
            until(lambda: it.state["problem"])
            assert processes[-1].wait() != 0
            processes.append(start(command, proxy.backend))
            until(lambda step=step: it.state["uploaded_step"] == step)
            proxy.heal()
            assert list(Remote(URL).checkpoints("t")) == [step]
            found = Remote(URL).download("t", step, Path(f"here-{step}"), print)
            assert content(found) == content(Path("runs/t/checkpoints") / found.name)
        it.close(PATIENCE_S)
    finally:
        proxy.backend = home
        for process in processes:
            process.kill()
            process.wait()


def start(command: list[str], port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    other = Server.__new__(Server)
    other.port = port
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            other.ask("PUT", f"/{BUCKET}")
            return process
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_who_does_not_answer_is_an_error_in_seconds(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    monkeypatch.setattr(storage, "READ_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(RemoteError, match="Timeout"):
            Remote(URL).steps("t")
    with pytest.raises(RemoteError, match="Could not connect|Cannot connect"):
        Remote(URL).steps("t")


def test_a_bucket_that_is_not_there(proxy: Proxy) -> None:
    with pytest.raises(RemoteError, match="sending"):
        Remote("s3://no-such-bucket/p").upload(saved(1))


def test_fsspecs_own_config_holds(monkeypatch: pytest.MonkeyPatch, proxy: Proxy) -> None:
    from fsspec.config import conf

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(conf, "s3", {"endpoint_url": proxy.url, "config_kwargs": {"read_timeout": 7}})
    remote = Remote(URL)
    remote.upload(saved(1))
    assert list(remote.checkpoints("t")) == [1]
    config = remote._storage._fs.s3._client_config
    assert (config.read_timeout, config.connect_timeout) == (7, storage.CONNECT_S)
    assert not remote._storage._fs.dircache.use_listings_cache


def test_a_process_ends_though_an_upload_hangs(proxy: Proxy) -> None:
    code = (
        "import sys; from pathlib import Path; from trainkit.checkpoint.mirror import Mirror\n"
        f"m = Mirror('{URL}', Path('runs/t'), print, differs=lambda a, b: [])\n"
        "m.submit(Path(sys.argv[1])); m.close(0.5)"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        found = subprocess.run(
            [sys.executable, "-c", code, str(saved(1))], env=env, capture_output=True, text=True, timeout=40
        )
    assert found.returncode == 0, found.stderr
    assert "step 1 is not on" in found.stdout
    assert found.stderr == ""
