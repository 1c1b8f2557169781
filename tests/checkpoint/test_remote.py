"""A remote never shows half a checkpoint, and nothing that it holds is believed before its hash is right."""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checkpoint.remotes import RUN_YAML, at, change, content, empty_memory, fetched, flip, saved
from trainkit.checkpoint import files, store
from trainkit.checkpoint.manifest import NAME, BadCheckpoint
from trainkit.checkpoint.remote import Remote
from trainkit.checkpoint.storage import RemoteError, Storage
from trainkit.errors import DamagedError, UserError

pytest.importorskip("fsspec", reason="needs fsspec: pip install 'trainkit[remote]'")
CALLS = ["entries", "read", "holds", "put", "write", "remove", "remove_folder"]


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    empty_memory()
    return Remote(f"file://{tmp_path}/far/p" if request.param == "file" else "memory://far/p")


def test_what_is_sent_comes_back(remote: Remote) -> None:
    sent = [saved(step) for step in (1, 2, 10)]
    for folder in sent:
        remote.upload(folder)
    assert remote.runs() == ["t"]
    assert {step: m.encode() for step, m in remote.checkpoints("t").items()} == {
        store.step_of(f.name): (f / NAME).read_bytes() for f in sent
    }
    path = fetched(remote)
    assert path == Path("here/step-0000000010")
    assert content(path) == content(sent[2])
    assert content(fetched(remote, 2)) == content(sent[1])
    assert sorted(os.listdir("here")) == ["step-0000000002", "step-0000000010"]
    assert remote.config("t") == RUN_YAML == b"".join(remote._storage.read("t/run.yaml", len(RUN_YAML))).decode()
    remote.remove("t", 10)
    assert list(remote.checkpoints("t")) == remote.steps("t") == [1, 2]


def test_nothing_there_is_no_error(remote: Remote) -> None:
    assert (remote.runs(), remote.steps("t"), remote.newest("t"), remote.config("t")) == ([], [], None, None)
    with pytest.raises(UserError, match="has no whole checkpoint"):
        fetched(remote)
    with pytest.raises(UserError, match="no name of a run"):
        remote.steps("../t")


def test_a_file_is_read_in_parts(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainkit.checkpoint.storage.PART", 1000)
    sent = saved(1, size=3000, empty=b"")
    remote.upload(sent)
    assert content(fetched(remote)) == content(sent)


@pytest.mark.parametrize("act", ["send", "replace", "remove"])
def test_a_fault_at_every_call_shows_no_half_checkpoint(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = {name: getattr(Storage, name) for name in CALLS}
    calls = 0

    def failing(name: str, at_call: int) -> Callable[..., Any]:
        def call(self: Storage, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != at_call:
                return real[name](self, *args)
            if name in ("put", "write"):  # half of it arrives
                path, data = (args[1], args[0].read_bytes()) if name == "put" else args
                real["write"](self, path, data[: len(data) // 2])
            raise RemoteError(name)

        return call

    for at_call in itertools.count(1):
        empty_memory()
        remote, good = Remote("memory://far/p"), []
        remote.upload(saved(1))
        if act != "send":
            remote.upload(saved(2, other=b"1" * 3000))
            good.append(content(Path("runs/t") / "checkpoints" / "step-0000000002"))
        new = saved(2, other=b"2" * 3000)
        good += [content(new)] if act != "remove" else []
        calls = 0
        with monkeypatch.context() as patch, contextlib.suppress(RemoteError):
            for name in CALLS:
                patch.setattr(Storage, name, failing(name, at_call))
            remote.remove("t", 2) if act == "remove" else remote.upload(new)
        assert 1 in remote.checkpoints("t")
        if 2 in remote.checkpoints("t"):
            assert content(remote.download("t", 2, Path(f"here-{at_call}"), print)) in good
        remote.upload(new)
        assert content(remote.download("t", None, Path(f"there-{at_call}"), print)) == content(new)
        if calls < at_call:
            break
    assert at_call > 3


def test_only_what_is_missing_is_sent_again(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    puts, write, read, put = [], Storage.write, Storage.read, Storage.put
    monkeypatch.setattr(Storage, "put", lambda *args: (puts.append(args[1].name), put(*args))[1])
    monkeypatch.setattr(Storage, "write", _refuse)
    with pytest.raises(RemoteError):
        remote.upload(saved(1))
    assert len(puts) == 4
    change(remote, at(1, "train_state.json"), lambda _: b"[]")  # of the same size
    monkeypatch.setattr(Storage, "write", write)
    if remote.url.startswith("memory"):  # what another process left is read again, and sent where it is wrong
        remote = Remote(remote.url)
    reads: list[str] = []
    monkeypatch.setattr(Storage, "read", lambda *args: (reads.append(args[1]), read(*args))[1])
    remote.upload(saved(1))
    assert puts[4:] == ["train_state.json"]
    assert (at(1, "shard-00000-of-00001.safetensors") in reads) == remote.url.startswith("memory")
    assert list(remote.checkpoints("t")) == [1]


def _refuse(*_: Any) -> None:
    raise RemoteError("refused")


@pytest.mark.parametrize("how", [lambda d: d[:-1], flip, lambda d: d + b"x"], ids=["cut", "flipped", "longer"])
def test_what_arrives_otherwise_is_refused(how: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    remote, put = Remote("memory://far/p"), Storage.put

    def bad(self: Storage, local: Path, path: str) -> None:
        put(self, local, path)
        change(remote, path, how)

    empty_memory()
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "put", bad)
        with pytest.raises(RemoteError, match="did not arrive as it was sent"):
            remote.upload(saved(1))
    assert remote.checkpoints("t") == {}
    remote.upload(saved(1))
    assert list(remote.checkpoints("t")) == [1]


def test_a_local_checkpoint_that_is_damaged_is_not_sent_again_and_again(remote: Remote) -> None:
    folder = saved(1)
    shard = folder / "shard-00000-of-00001.safetensors"
    shard.write_bytes(flip(shard.read_bytes()))
    with pytest.raises(BadCheckpoint, match="shard"):
        remote.upload(folder)
    assert remote.checkpoints("t") == {}


@pytest.mark.parametrize("name", ["shard-00000-of-00001.safetensors", "train_state.json", "run.yaml", NAME])
@pytest.mark.parametrize("how", [lambda d: d[:-1], flip, lambda d: d + b"x"], ids=["cut", "flipped", "longer"])
def test_what_is_damaged_there_is_left_for_the_older(remote: Remote, name: str, how: Callable[[bytes], bytes]) -> None:
    old, new = saved(1), saved(2)
    remote.upload(old)
    remote.upload(new)
    change(remote, at(2, name), how)
    notes: list[str] = []
    assert content(fetched(remote, notes=notes)) == content(old)
    assert len(notes) == 1
    assert "step-0000000002" in notes[0]
    assert os.listdir("here") == ["step-0000000001"]
    assert remote.config("t") == RUN_YAML
    with pytest.raises(DamagedError, match="step-0000000002"):
        fetched(remote, 2)
    remote.remove("t", 1)
    with pytest.raises(DamagedError):
        fetched(remote)


def test_a_file_that_is_not_there_makes_it_none(remote: Remote) -> None:
    remote.upload(saved(1))
    remote._storage.remove(at(1, "train_state.json"))
    assert remote.checkpoints("t") == {}
    remote.upload(saved(1))
    assert list(remote.checkpoints("t")) == [1]


def test_no_more_is_fetched_after_a_file_that_is_wrong(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.upload(saved(1))
    change(remote, at(1, "run.yaml"), flip)
    reads, read = [], Storage.read
    monkeypatch.setattr(Storage, "read", lambda *args: (reads.append(args[1]), read(*args))[1])
    with pytest.raises(DamagedError):
        fetched(remote)
    assert reads == [at(1, NAME), at(1, "run.yaml")]


def test_what_is_fetched_is_durable_and_verified_before_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_memory()
    remote, done = Remote("memory://far/p"), []
    remote.upload(saved(1))
    for module, name in ((files, "write"), (files, "rename_new"), (store, "verify")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (done.append(name), real(*a))[1])
    real_sync = sys.modules["trainkit.checkpoint.remote"].sync_folder  # type: ignore[attr-defined]
    monkeypatch.setattr("trainkit.checkpoint.remote.sync_folder", lambda p: (done.append("sync"), real_sync(p))[1])
    fetched(remote)
    assert done == ["write"] * 4 + ["sync", "verify", "rename_new"]


def test_what_lies_here_already(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.upload(saved(1))
    first = fetched(remote)
    shard = first / "shard-00000-of-00001.safetensors"
    inode = shard.stat().st_ino
    assert fetched(remote) == first
    assert shard.stat().st_ino == inode
    for _ in range(2):
        shard.write_bytes(flip(shard.read_bytes()))
        fetched(remote)
        assert content(first) == content(saved(1))
    names = [".bad-step-0000000001", ".bad-step-0000000001.2", "step-0000000001"]
    assert sorted(os.listdir("here")) == names
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"10 B.* free"):
        remote.download("t", 1, Path("full"), print)


def test_what_a_person_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for url, what in (("s3://", "not the URL"), ("bucket/t", "not the URL"), ("s4://b", "knows no protocol 's4'")):
        with pytest.raises(UserError, match=what):
            Remote(url)
    assert Remote("memory://me:secret@far/p/").url == "memory://far/p"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(UserError, match=r"pip install 'trainkit\[remote\]'"):
            Remote("s3://bucket")
    monkeypatch.setattr("fsspec.get_filesystem_class", _missing)
    with pytest.raises(UserError, match=r"pip install 'trainkit\[remote\]'"):
        Remote("s3://bucket")


def _missing(_: str) -> None:
    raise ImportError("Install s3fs to access S3")
