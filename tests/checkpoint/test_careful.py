"""What only matters when something else goes wrong too: each fsync, each look, each flag on its own."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_store import FACTS, save, saver
from trainkit import atomic
from trainkit.checkpoint import Checkpoint, SaveFailed, files, shelf, store
from trainkit.checkpoint import manifest as manifests
from trainkit.parallel import Group, LostRankError


def test_a_small_file_is_on_the_disk_before_it_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (did.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1]
    )
    monkeypatch.setattr(Path, "replace", lambda old, new: (did.append("replace"), replace(old, new))[1])
    Path("folder").mkdir()
    atomic.write(Path("folder/history.json"), b"[]")
    assert did == [f".history.json.{os.getpid()}.tmp", "replace", "folder"]


def test_a_rename_replaces_nothing_not_even_an_empty_folder(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    with pytest.raises(FileExistsError):
        files.rename_new(old, new)
    assert old.exists()


def test_what_is_read_back_is_read_from_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    forget, hash_of = files.forget, files.hash_of
    monkeypatch.setattr(files, "forget", lambda path: (forgotten.append(path.name), forget(path))[1])

    def looked_at(path: Path, size: int) -> str:
        assert path.name in forgotten, f"{path.name} is read back from memory"
        return hash_of(path, size)

    monkeypatch.setattr(files, "hash_of", looked_at)
    path = save(saver(), 1)
    assert set(forgotten) == {p.name for p in path.iterdir()}


def test_what_is_set_aside_stays_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    it = saver(keep=4)
    paths = [save(it, step) for step in (1, 2)]
    synced: list[list[str]] = []
    monkeypatch.setattr(shelf, "sync_folder", lambda folder: synced.append(sorted(p.name for p in folder.iterdir())))
    it.load(paths[0])
    assert synced == [[".bad-step-0000000002", "step-0000000001"]]


def test_what_a_failed_save_could_not_remove_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    it = saver()
    with monkeypatch.context() as stubborn:
        stubborn.setattr(shutil, "rmtree", lambda *_, **__: None)
        stubborn.setattr(files, "rename_new", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(SaveFailed):
            save(it, 1)
    assert [p.name for p in it.folder.iterdir()] == [f".tmp-step-0000000001-{os.getpid()}"]
    save(it, 1)
    assert [p.name for p in it.folder.iterdir()] == ["step-0000000001"]


class Lonely(Group):
    """Two ranks, of which the other is not there."""

    def all_do(self, work: Any) -> list[Any]:
        raise LostRankError("another rank does not answer: gone")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_lost_rank_is_no_save_to_be_tried_again(asynchronous: bool) -> None:
    it = Checkpoint(asynchronous=asynchronous).build(
        Path("run"), higher_is_better=False, versions={}, saving=Lonely(), host=Lonely()
    )
    it.save(1, {"model.w": torch.ones(2)}, {}, {}, facts=FACTS)
    it.wait()
    for _ in range(2):
        with pytest.raises(LostRankError):
            it.finished()


def test_a_manifest_in_other_words_is_another_manifest() -> None:
    path = save(saver(), 3)
    file = path / manifests.NAME
    value = json.loads(file.read_bytes())
    file.write_text(json.dumps(value, indent=1))
    with pytest.raises(manifests.BadCheckpoint, match="does not have its own hash"):
        store.load(path)


@pytest.mark.parametrize("name", ["../../evil", "/evil", "a/b", "", ".hidden", manifests.NAME, "x" * 129])
def test_a_manifest_names_no_file_outside_its_folder(name: str) -> None:
    """Whoever fetches a checkpoint from a remote writes files of these names."""
    its = {"size": 1, "xxh3_128": "0"}
    with pytest.raises(manifests.BadCheckpoint, match="it names a file"):
        manifests.decode(manifests.Manifest("t", 1, 1.0, {}, {}, {name: its}, {}).encode())
