"""What anyone may have put on a remote: names, manifests, listings and links that lead elsewhere."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.remotes import at, content, empty_memory, fetched, saved
from trainkit.checkpoint.manifest import NAME, BadCheckpoint, canonical
from trainkit.checkpoint.remote import Remote

pytest.importorskip("fsspec", reason="needs fsspec: pip install 'trainkit[remote]'")


@pytest.fixture(params=["file", "memory"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    empty_memory()
    return Remote(f"file://{tmp_path}/far/p" if request.param == "file" else "memory://far/p")


def hostile(step: int, **changes: Any) -> bytes:
    body = {"format": 1, "run": "t", "step": step, "time": 1.0, "versions": {}, "facts": {}, "files": {}, "tensors": {}}
    body |= changes
    return canonical({**body, "sha256": hashlib.sha256(canonical(body)).hexdigest()})


NO_HASH = "0" * 32


@pytest.mark.parametrize(
    "manifest",
    [
        hostile(2, files={"../../evil": {"size": 4, "xxh3_128": NO_HASH}}),
        hostile(2, files={"/evil": {"size": 4, "xxh3_128": NO_HASH}}),
        hostile(2, files={"..": {"size": 0, "xxh3_128": NO_HASH}}),
        hostile(2, files={NAME: {"size": 4, "xxh3_128": NO_HASH}}),
        hostile(2, files={"evil": {"size": 1 << 50, "xxh3_128": NO_HASH}}),
        hostile(2, files={"evil": {"size": -1, "xxh3_128": NO_HASH}}),
        hostile(2, files={"evil": {"size": 4, "xxh3_128": NO_HASH}}),
        hostile(2, files=["evil"]),
        hostile(3),
        b"{}",
        b"[" * 100_000,
    ],
    ids=["up", "absolute", "dots", "itself", "huge", "negative", "hash", "list", "another step", "empty", "deep"],
)
def test_a_hostile_manifest_gets_nothing_written(remote: Remote, manifest: bytes, tmp_path: Path) -> None:
    old = saved(1)
    remote.upload(old)
    for path in (at(2, "evil"), "t/checkpoints/evil", "t/evil", "evil"):
        remote._storage.write(path, b"evil")
    remote._storage.write(at(2, NAME), manifest)
    notes: list[str] = []
    assert content(fetched(remote, notes=notes)) == content(old)
    assert len(notes) == 1
    assert os.listdir("here") == ["step-0000000001"]
    assert not [p for p in tmp_path.rglob("evil") if "far" not in p.parts]


def test_a_hostile_listing_is_not_followed(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.upload(saved(1))
    real = remote._storage._fs.ls

    def ls(path: str, **how: Any) -> list[dict[str, Any]]:
        odd = [
            "..",
            ".",
            "",
            "step-1",
            "step-0000000001x",
            ".tmp-step-0000000001",
            "-rf",
            "step-000000000\u0661",
            "a\nb",
        ]
        found = [{"name": f"{path}/{name}", "type": "directory", "size": 0} for name in odd]
        return real(path, **how) + found + [{"name": f"{path}/step-0000000009", "type": "file", "size": 1}]

    monkeypatch.setattr(remote._storage._fs, "ls", ls)
    assert remote.runs() == ["t"]
    assert remote.steps("t") == [1]
    assert fetched(remote).name == "step-0000000001"


def test_no_link_is_followed(tmp_path: Path) -> None:
    remote, old, new = Remote(f"file://{tmp_path}/far"), saved(1), saved(2)
    remote.upload(old)
    remote.upload(new)
    secret = tmp_path / "secret"
    secret.write_bytes((new / "train_state.json").read_bytes())
    file = tmp_path / "far" / at(2, "train_state.json")
    file.unlink()
    file.symlink_to(secret)
    (tmp_path / "far/t/checkpoints/step-0000000003").symlink_to(new.absolute())
    (tmp_path / "far/u").symlink_to(tmp_path / "far/t")
    assert remote.runs() == ["t"]
    assert list(remote.checkpoints("t")) == [1]
    assert content(fetched(remote)) == content(old)
    (tmp_path / "far" / at(1, NAME)).unlink()
    (tmp_path / "far" / at(1, NAME)).symlink_to(old.absolute() / NAME)
    assert remote.checkpoints("t") == {}


@pytest.mark.parametrize("same", [True, False])
def test_nothing_is_written_through_a_link(tmp_path: Path, same: bool) -> None:
    remote, new, secret = Remote(f"file://{tmp_path}/far"), saved(1), tmp_path / "secret"
    for name in ("t/run.yaml", at(1, "train_state.json"), at(1, NAME)):
        secret.write_bytes((new / name.rpartition("/")[2]).read_bytes() if same else b"mine")
        before = secret.read_bytes()
        link = tmp_path / "far" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(secret)
        if name != at(1, NAME):
            (tmp_path / "far" / at(1, NAME)).unlink(missing_ok=True)
        remote.upload(new)
        assert secret.read_bytes() == before
        assert not link.is_symlink()
        assert list(remote.checkpoints("t")) == [1]


@pytest.mark.parametrize("how", ["more", "less"])
def test_a_remote_that_gives_another_number_of_bytes(remote: Remote, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    remote._storage.write("t/x", b"12345678")
    real = remote._storage._fs.cat_file

    def cat_file(path: str, start: int, end: int) -> bytes:
        return bytes(real(path)) * 2 if how == "more" else bytes(real(path, start=start, end=end - 1))

    monkeypatch.setattr(remote._storage._fs, "cat_file", cat_file)
    with pytest.raises(BadCheckpoint, match="x is cut short"):
        list(remote._storage.read("t/x", 8))


def test_a_manifest_that_is_too_long_is_not_read(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.upload(saved(1))
    monkeypatch.setattr("trainkit.checkpoint.manifest.MAX_BYTES", 10)
    monkeypatch.setattr(remote._storage._fs, "cat_file", None)
    assert remote.checkpoints("t") == {}
