"""What is saved comes back, and what is not exactly that is no checkpoint."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainkit.checkpoint import Checkpoint, Checkpointer, SaveFailed, files, layout, store, tensors
from trainkit.checkpoint.manifest import BadCheckpoint, canonical
from trainkit.errors import DamagedError

FACTS = {"metric": None, "epoch_end": False, "epoch": 0.0, "val_loss": None}


def every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kinds: dict[str, torch.Tensor] = {
        f"model.{str(dtype).removeprefix('torch.')}": torch.randn(3, 5).to(dtype) for dtype in tensors._NAMES
    }
    return kinds | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).T,
        "sliced": torch.randn(8, 8)[::2, 1:3],
        "grad": torch.randn(3, requires_grad=True),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def saver(folder: Path = Path("run"), **policy: Any) -> Checkpointer:
    it = Checkpoint(**policy).build(folder, higher_is_better=False, versions={"trainkit": "0"})
    it.preflight(0)
    return it


def save(it: Checkpointer, step: int, content: dict[str, torch.Tensor] | None = None, **facts: Any) -> Path:
    state = {"step": step, "text": "é", "number": 0.1}
    it.save(step, content or {"model.w": torch.full((4,), float(step))}, state, {"run.yaml": b"x"}, facts=FACTS | facts)
    it.wait()
    for outcome in it.finished():
        if outcome.error:
            raise outcome.error
    return it.folder / store.step_name(step)


def test_what_is_saved_comes_back_to_the_bit() -> None:
    content = every_kind()
    path = save(saver(), 7, content)
    found = store.load(path)
    assert found.step == 7
    assert found.state == {"step": 7, "text": "é", "number": 0.1}
    assert found.files == {"run.yaml": b"x"}
    assert found.tensors.keys() == content.keys()
    for name, tensor in content.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(bits(found.tensors[name]), bits(tensor)), name


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    content = {k: v.detach().contiguous() for k, v in every_kind().items()}
    shard = save(saver(), 1, content) / "shard-00000-of-00001.safetensors"
    theirs = load_file(shard)
    save_file(content, tmp_path / "theirs.safetensors")
    ours = {}
    file = tmp_path / "theirs.safetensors"
    with files.Reading(file, file.stat().st_size) as source:
        for name, dtype, shape, fill in tensors.stream(source):
            ours[name] = torch.empty(shape, dtype=dtype)
            fill(ours[name])
    for name, tensor in content.items():
        for other in (theirs[name], ours[name]):
            assert other.dtype == tensor.dtype
            assert torch.equal(bits(other), bits(tensor)), name


def test_large_states_go_into_several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    content = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    monkeypatch.setattr(layout.plan, "__defaults__", ((), 100))
    path = save(saver(), 1, content)
    assert len(list(path.glob("shard-*-of-00003.safetensors"))) == 3
    assert all(torch.equal(store.load(path).tensors[k], v) for k, v in content.items())


def test_every_flipped_byte_is_found() -> None:
    path = save(saver(), 3)
    for file in path.iterdir():
        good = file.read_bytes()
        for i in range(len(good)):
            for flip in (1, 0x80):
                bad = bytearray(good)
                bad[i] ^= flip
                file.write_bytes(bad)
                with pytest.raises(BadCheckpoint):
                    store.load(path)
        file.write_bytes(good)
    assert store.load(path).step == 3


def test_every_truncation_is_found() -> None:
    path = save(saver(), 3)
    for file in path.iterdir():
        good = file.read_bytes()
        for length in range(len(good)):
            file.write_bytes(good[:length])
            with pytest.raises(BadCheckpoint):
                store.inspect(path)
        file.write_bytes(good + b" ")
        with pytest.raises(BadCheckpoint):
            store.inspect(path)
        file.write_bytes(good)


def test_another_shape_of_folder_is_found(tmp_path: Path) -> None:
    it = saver(keep=3)
    old, path = save(it, 2), save(it, 3)
    shard = "shard-00000-of-00001.safetensors"

    def broken(change: Any) -> None:
        kept = tmp_path / "kept"
        shutil.copytree(path, kept, symlinks=True)
        change()
        with pytest.raises(BadCheckpoint):
            store.load(path)
        shutil.rmtree(path)
        kept.rename(path)
        store.load(path)

    broken(lambda: (path / "more").write_text(""))
    broken(lambda: (path / "run.yaml").unlink())
    broken(lambda: shutil.copy(old / shard, path / shard))
    broken(lambda: shutil.copy(old / "train_state.json", path / "train_state.json"))
    broken(lambda: [shutil.copy(f, path) for f in old.iterdir()])

    def linked() -> None:
        (path / shard).rename(tmp_path / "elsewhere")
        (path / shard).symlink_to(tmp_path / "elsewhere")

    broken(linked)
    path.rename(path.with_name("step-0000000009"))
    with pytest.raises(BadCheckpoint, match="it says that it is step 3"):
        store.load(path.with_name("step-0000000009"))


HOSTILE = [
    lambda m: m | {"files": {"../../evil": {"size": 1, "xxh3_128": ""}}},
    lambda m: m | {"files": []},
    lambda m: m | {"step": "3"},
    lambda m: m | {"extra": 1},
    lambda m: {k: v for k, v in m.items() if k != "tensors"},
    lambda m: m | {"format": 99},
    lambda m: m | {"files": m["files"] | {"train_state.json": {"size": -1, "xxh3_128": "x"}}},
]


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_manifest_with_its_own_hash_is_refused(change: Any) -> None:
    import hashlib

    path = save(saver(), 3)
    value = json.loads((path / "manifest.json").read_bytes())
    del value["sha256"]
    value = change(value)
    value["sha256"] = hashlib.sha256(canonical(value)).hexdigest()
    (path / "manifest.json").write_bytes(canonical(value))
    with pytest.raises(BadCheckpoint):
        store.load(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a":1,"a":1}', '{"a":NaN}', "[" * 100_000, "é" * 10])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    path = save(saver(), 3)
    (path / "manifest.json").write_text(text)
    with pytest.raises(BadCheckpoint):
        store.load(path)


def test_a_bad_newest_is_set_aside_and_the_one_before_is_used() -> None:
    it = saver(keep=3)
    for step in (1, 2, 3):
        save(it, step)
    (it.folder / "step-0000000003" / "run.yaml").write_text("other")
    found = it.load_latest()
    assert found is not None
    assert found.step == 2
    assert (it.folder / ".bad-step-0000000003").is_dir()
    assert "step-0000000003 was set aside as .bad-step-0000000003: run.yaml" in it.notes[0]
    save(it, 3)
    (it.folder / "step-0000000003" / "run.yaml").write_text("other")
    it.load_latest()
    assert (it.folder / ".bad-step-0000000003.2").is_dir()


def test_none_good_is_never_a_start_from_zero() -> None:
    it = saver()
    assert it.load_latest() is None
    path = save(it, 1)
    (path / "run.yaml").write_text("other")
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"no checkpoint in .* is good"):
            it.load_latest()


def test_going_back_sets_newer_ones_aside() -> None:
    it = saver(keep=4)
    paths = [save(it, step) for step in (1, 2, 3)]
    assert it.load(paths[0]).step == 1
    assert sorted(p.name for p in it.folder.iterdir()) == [
        ".bad-step-0000000002",
        ".bad-step-0000000003",
        paths[0].name,
    ]


def test_a_save_that_is_read_back_wrong_is_no_save(monkeypatch: pytest.MonkeyPatch) -> None:
    it = saver()
    save(it, 1)
    real = files.write

    def bit_rot(path: Path, parts: Any) -> Any:
        facts = real(path, parts)
        if path.name == "run.yaml":
            path.write_bytes(b"y")
        return facts

    monkeypatch.setattr(files, "write", bit_rot)
    with pytest.raises(SaveFailed, match="is not on the disk as it was written"):
        save(it, 2)
    found = it.load_latest()
    assert found is not None
    assert found.step == 1


def test_a_number_that_is_none_is_not_saved() -> None:
    it = saver()
    save(it, 1)
    it.save(2, {}, {"loss": float("nan")}, {}, facts=FACTS, wait=True)
    (outcome,) = (o for o in it.finished() if o.step == 2)
    assert isinstance(outcome.error, SaveFailed)
    assert [p.name for p in it.folder.iterdir()] == ["step-0000000001"]


def test_loading_executes_nothing() -> None:
    fired: list[str] = []
    watching = True

    def watch(event: str, arguments: Any) -> None:
        if watching and event in ("pickle.find_class", "exec", "marshal.loads", "os.system", "subprocess.Popen"):
            fired.append(event)

    path = save(saver(), 1, every_kind())
    store.load(path)  # whatever is imported late is imported now
    sys.addaudithook(watch)
    store.load(path)
    watching = False
    assert fired == []


def test_modes_respect_the_umask() -> None:
    old = os.umask(0o027)
    try:
        path = save(saver(), 1)
    finally:
        os.umask(old)
    assert {f.stat().st_mode & 0o777 for f in path.iterdir()} == {0o640}


def test_a_save_that_is_under_way_keeps_its_own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.write

    def slowly(path: Path, parts: Any) -> Any:
        time.sleep(0.1)
        return real(path, parts)

    it = saver(keep=9)
    monkeypatch.setattr(files, "write", slowly)
    weight = torch.zeros(1000)
    for step in (1, 2, 3):
        weight.fill_(step)
        it.save(step, {"model.w": weight}, {}, {}, facts=FACTS)
        it.make_room({"model.w": weight})
    it.wait()
    for outcome in it.finished():
        assert outcome.error is None
        assert outcome.stall_s < outcome.save_s
    for step in (1, 2, 3):
        assert torch.equal(
            store.load(it.folder / store.step_name(step)).tensors["model.w"], torch.full((1000,), float(step))
        )
