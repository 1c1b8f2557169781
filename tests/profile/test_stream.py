"""What is read from the profiler's tree, on trees written by hand: also such as only a GPU makes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._C._profiler import RecordScope, _EventType

from trainkit.profile import MemoryProfile, allocations, memory, stream
from trainkit.profile.allocations import Allocations
from trainkit.profile.blocks import Mark, read
from trainkit.profile.phases import parts
from trainkit.profile.stream import Kind

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NODE = "autograd::engine::evaluate_function: "


class Clock:
    """Gives every event its time, in the order in which they are written down."""

    def __init__(self) -> None:
        self.ns = 0

    def tick(self) -> int:
        self.ns += 1
        return self.ns

    def memory(self, pointer: int, size: int, device: torch.device = GPU) -> Any:
        facts = SimpleNamespace(ptr=pointer, alloc_size=size, device=device)
        at = self.tick()
        return SimpleNamespace(
            tag=_EventType.Allocation,
            name="[memory]",
            extra_fields=facts,
            children=[],
            start_time_ns=at,
            end_time_ns=at,
        )

    def op(self, name: str, *children: Any, sequence: int = -1, scope: Any = RecordScope.FUNCTION) -> Any:
        """`children` are functions: they happen between the beginning and the end."""
        begin = self.tick()
        below = [child() for child in children]
        return SimpleNamespace(
            tag=_EventType.TorchOp,
            name=name,
            extra_fields=SimpleNamespace(sequence_number=sequence, scope=scope),
            children=below,
            start_time_ns=begin,
            end_time_ns=self.tick(),
        )


def named(tree: list[Any], device: torch.device = GPU) -> list[tuple[int, str, int]]:
    events = stream.events(tree, device)
    found = parts(events)
    assert [p.begin for p in found[1:]] == [p.end for p in found[:-1]]
    assert (found[0].begin, found[-1].end) == (0, len(events))
    return [(p.step, p.phase, p.end - p.begin) for p in found if p.end > p.begin]


def test_a_backward_ends_where_nodes_of_a_later_forward_begin() -> None:
    c = Clock()
    tree = [
        c.memory(1, 10),
        c.op(NODE + "B", sequence=7),
        c.op(NODE + "A", sequence=6),
        c.op(NODE + "torch::autograd::AccumulateGrad", sequence=-1),
        c.op(NODE + "B", sequence=9),
        c.memory(1, -10),
        c.op(NODE + "A", sequence=8),
        c.memory(2, 10),
        c.op("Optimizer.step#SGD.step", lambda: c.op(NODE + "inside", sequence=20)),
        c.op("Optimizer.zero_grad#SGD.zero_grad"),
        c.memory(3, 10),
    ]
    # the second backward follows the first at once; a free between two of its nodes is its own
    assert named(tree) == [
        *((-1, "forward", 1), (-1, "backward", 6), (-1, "backward", 5)),
        *((-1, "optimizer", 1), (-1, "optimizer", 4), (-1, "optimizer", 2), (-1, "optimizer", 1)),
    ]


def test_between_steps_only_explicit_phases_are_told_apart() -> None:
    c = Clock()
    tree = [
        c.memory(1, 10),
        c.op("trainkit.step 4", lambda: c.memory(2, 10), lambda: c.op(NODE + "A", sequence=1)),
        c.op(NODE + "B", sequence=5),
        c.op("trainkit.phase save", lambda: c.op(NODE + "C", sequence=9), lambda: c.memory(3, 10)),
        c.memory(3, -10),
    ]
    assert named(tree) == [
        *((-1, "outside", 1), (4, "forward", 2), (4, "backward", 2), (4, "backward", 1)),
        *((-1, "outside", 2), (-1, "save", 5), (-1, "outside", 1)),
    ]
    assert named([c.memory(1, 10)]) == [(-1, "forward", 1)]


def test_only_the_devices_own_memory_counts_and_threads_are_merged_by_time() -> None:
    c = Clock()
    first = c.op("aten::a", lambda: c.memory(1, 10))
    second = c.op("aten::b", lambda: c.memory(2, 20), lambda: c.memory(9, 90, CPU))
    found = stream.events([second, first], GPU)
    assert [(e.kind, e.pointer, e.bytes, e.within) for e in found] == [
        (Kind.MEMORY, 1, 10, ("aten::a",)),
        (Kind.MEMORY, 2, 20, ("aten::b",)),
    ]
    assert [e.pointer for e in stream.events([second, first], CPU)] == [9]


def test_a_forward_that_is_run_again_is_told_by_its_sequence_numbers() -> None:
    c = Clock()
    node = c.op(
        NODE + "A",
        lambda: c.op(
            "A",
            lambda: c.op("aten::sum", lambda: c.memory(1, 1), sequence=-1),
            lambda: c.op("aten::mm", lambda: c.memory(2, 2), sequence=8),
            lambda: c.memory(3, 3),
            lambda: c.op("aten::relu", lambda: c.memory(4, 4), sequence=9),
            lambda: c.op("aten::mul", lambda: c.memory(5, 5), sequence=-1),
            lambda: c.op(NODE + "nested", lambda: c.op("aten::add", lambda: c.memory(6, 6), sequence=10), sequence=9),
            sequence=3,
            scope=RecordScope.BACKWARD_FUNCTION,
        ),
        sequence=3,
    )
    found = stream.events([node], GPU)
    kinds = [e.kind for e in found]
    inside = found[kinds.index(Kind.AGAIN) : kinds.index(Kind.AGAIN_END)]
    assert [e.pointer for e in inside if e.kind is Kind.MEMORY] == [2, 3, 4]
    assert kinds.count(Kind.AGAIN) == 2  # the nested node has its own


def test_on_a_gpu_everything_that_lived_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those of blocks, the rest of what was allocated is temporary, and so is a peak that nobody reported."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 20_000)
    seen = Allocations(nn.Linear(3, 3), device=GPU)
    seen._known = {1: ("parameters", 512)}
    seen._unknown = 3000
    c = Clock()
    tree = [
        c.op("aten::mm", lambda: c.memory(2, 1024)),
        c.op(NODE + "A", lambda: c.memory(3, 2048), lambda: c.memory(7, -512), sequence=1),  # 7 was never seen
        c.op(NODE + "B", lambda: c.memory(2, -1024), sequence=0),
        c.op("Optimizer.step#SGD.step", lambda: c.memory(1, 512), lambda: c.memory(4, 512)),  # 1 is used again
    ]
    seen._read(stream.events(tree, GPU))
    expected = {"parameters": 512, "gradients": 2048, "optimizer": 0, "activations": 1024, "temporary": 3000}
    assert seen.by_phase["backward"].at_peak == expected
    assert seen.by_phase["optimizer"].at_peak == {**expected, "parameters": 0, "optimizer": 1024, "activations": 0}
    assert (seen.peak, seen.reserved) == (10_000, 20_000)
    assert seen.at_peak == {**expected, "temporary": 3000 + 10_000 - sum(expected.values())}


def test_what_fsdp_communicates_has_ended_before_an_update() -> None:
    """Also when gloo's thread was the last to hold it, and nobody reported its end."""
    c = Clock()
    places = {3: ("gradients", 30)}
    marks = [Mark(places, set()) for _ in range(2)]
    tree = [
        c.op("FSDP::all_gather", lambda: c.memory(6, 6)),
        c.op(
            NODE + "A",
            lambda: c.op("FSDP::post_backward", lambda: c.memory(1, 10), lambda: c.memory(3, 30)),
            lambda: c.op("trainkit.mark 0"),  # of an update in the backward: more is to come
            sequence=1,
        ),
        c.op("FSDP::post_backward", lambda: c.memory(2, 20)),  # the last one, behind all nodes
        c.op("aten::norm", lambda: c.memory(4, 4)),
        c.op("Optimizer.step#SGD.step", lambda: c.op("trainkit.mark 1"), lambda: c.memory(5, 5)),
        c.op("aten::after", lambda: c.memory(2, -20)),  # nor does it matter when it is reported after all
    ]
    events = stream.events(tree, GPU)
    found = {b.bytes: b for b in read(events, parts(events), {}, marks)}
    update = next(i for i, event in enumerate(events) if event.text == "1")
    assert {size: block.end for size, block in found.items()} == {
        6: update,
        10: update,
        20: update,
        30: None,
        4: None,
        5: None,
    }


def test_blocks_of_a_gpu_are_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(100, 1)
    seen = Allocations(model)
    exact = {size for _, size in seen._places().values()}
    assert exact == {400, 4}
    monkeypatch.setattr(allocations, "GRANULE", 512)
    seen.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(seen, "_storages", lambda: [("parameters", p.untyped_storage()) for p in model.parameters()])
    assert {size for _, size in seen._places().values()} == {512}


def test_on_a_gpu_a_snapshot_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[Any] = []
    model = nn.Linear(2, 2)
    watch = MemoryProfile(picture=False).build(tmp_path / "profile", model, torch.optim.SGD(model.parameters()))

    class OnGpu(Allocations):
        def __enter__(self) -> "OnGpu":
            super().__enter__()
            self.device = GPU
            said.append("looks")
            return self

        def __exit__(self, *raised: Any) -> None:
            self.device = CPU
            super().__exit__(*raised)
            self.device = GPU

    monkeypatch.setattr(memory, "Allocations", OnGpu)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: said.append(how))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: said.append(Path(path)))
    watch.start()
    with watch.step(1):
        pass
    watch.stop()
    watch.write()
    watch.write()
    assert said == [
        "looks",
        {"max_entries": memory.HISTORY},
        tmp_path / "profile" / "snapshot.pickle",
        {"enabled": None},
    ]
    assert (tmp_path / "profile").is_dir()
