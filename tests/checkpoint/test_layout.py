"""Which part of which tensor lies where: parts make up the whole, whoever writes and whoever reads them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.test_store import save, saver
from trainkit.checkpoint import store
from trainkit.checkpoint.layout import SMALL, Box, boxes_by_file, describe, overlap, plan
from trainkit.checkpoint.manifest import BadCheckpoint, canonical


def described(shape: list[int], *parts: tuple[list[int], list[int]]) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": shape, "parts": [[f"f{i}", o, s] for i, (o, s) in enumerate(parts)]}}


@pytest.mark.parametrize(
    "wrong",
    [
        described([4], ([0], [2]), ([1], [2])),  # as many numbers, but one twice and one never
        described([2, 2], ([0, 0], [2, 1]), ([0, 0], [1, 2])),
        described([4], ([0], [2])),
        described([4], ([0], [4]), ([0], [4])),
        described([4], ([-1], [4])),
        described([4], ([0], [5])),
        described([4], ([0, 0], [4, 1])),
        described([4], ([True], [3]), ([0], [1])),
    ],
)
def test_parts_that_do_not_make_it_up_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the parts of the tensor w|a part of the tensor w"):
        boxes_by_file(wrong)


def test_parts_that_do_are_taken() -> None:
    boxes_by_file(described([5, 2], ([3, 0], [2, 2]), ([0, 0], [3, 2])))
    boxes_by_file(described([2, 2], ([0, 0], [2, 1]), ([0, 1], [2, 1])))
    boxes_by_file(described([], ([], [])))
    boxes_by_file(described([0, 3], ([0, 0], [0, 3])))


@given(st.lists(st.integers(0, 6), min_size=4, max_size=4), st.lists(st.integers(0, 5), min_size=4, max_size=4))
@settings(max_examples=300, deadline=None)
def test_an_overlap_is_what_two_boxes_share(offsets: list[int], sizes: list[int]) -> None:
    a, b = Box("w", tuple(offsets[:2]), tuple(sizes[:2])), Box("w", tuple(offsets[2:]), tuple(sizes[2:]))

    def cells(box: Box) -> torch.Tensor:
        whole = torch.zeros(12, 12, dtype=torch.bool)
        whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = True
        return whole

    both = cells(a) & cells(b)
    found = overlap(a, b)
    assert (found is not None) == bool(both.any())
    if found:
        numbers = torch.arange(144).reshape(12, 12)
        parts = [
            numbers[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))][place]
            for box, place in zip((a, b), found, strict=True)
        ]
        assert torch.equal(parts[0], parts[1])
        assert parts[0].flatten().tolist() == numbers[both].tolist()


def test_a_replica_is_written_once_and_the_work_is_shared() -> None:
    boxes = [(Box(f"w{i}", (0,), (100,)), SMALL * (1 + i)) for i in range(8)] + [(Box("step", (), ()), 4)]
    files = plan([boxes, boxes, boxes])
    written = [box for file in files for box in file.boxes]
    assert sorted(box.name for box in written) == sorted(box.name for box, _ in boxes)
    sizes = dict(boxes)
    load = [sum(sizes[box] for file in files if file.rank == rank for box in file.boxes) for rank in range(3)]
    assert max(load) < 2 * min(load)
    assert next(file.rank for file in files if any(box.name == "step" for box in file.boxes)) == 0
    packed = plan([boxes], packed=("w1",))
    assert [file.name for file in packed] == [
        "shard-00000-of-00002.safetensors",
        "shard-00001-of-00002.safetensors.zst",
    ]
    names = {box.name: ("F32", box.shape) for box, _ in boxes}
    assert boxes_by_file(describe(names, files)).keys() == {file.name for file in files}


def test_an_absurd_shape_asks_for_no_memory() -> None:
    path = save(saver(), 3)
    value = json.loads((path / "manifest.json").read_bytes())
    del value["sha256"]
    facts = value["tensors"]["model.w"]
    facts["shape"] = facts["parts"][0][2] = [1 << 40]
    value["sha256"] = hashlib.sha256(canonical(value)).hexdigest()
    Path(path / "manifest.json").write_bytes(canonical(value))
    with pytest.raises(BadCheckpoint, match="is too small for its tensors"):
        store.load(path)
