"""What leaves the device between forward and backward, when it comes back, and what stays. The lanes here copy, as a
GPU's do, and what has not been waited for is rubbish."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage, nn

from tests.test_models import model
from trainkit.memory.lanes import HostLanes, _bytes
from trainkit.memory.offload_activations import OffloadActivations, Traffic

RUBBISH = 171


class Copying(HostLanes):
    """Copies out at once and back at the last moment. `events` is what was asked for, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.sizes: list[int] = []
        self.out: list[UntypedStorage] = []

    def serve(self, device: torch.device) -> bool:
        return True

    def send(self, storage: UntypedStorage) -> int:
        self.out.append(storage.clone())
        self.sizes.append(storage.nbytes())
        self.events.append(("send", len(self.out) - 1))
        return len(self.out) - 1

    def settle(self, keep: int) -> None:
        self.events.append(("settle", keep))

    def fetch(self, sent: int) -> tuple[int, UntypedStorage]:
        self.events.append(("fetch", sent))
        room = torch.full((self.out[sent].nbytes(),), RUBBISH, dtype=torch.uint8).untyped_storage()
        return sent, room

    def wait(self, coming: tuple[int, UntypedStorage]) -> UntypedStorage:
        self.events.append(("wait", coming[0]))
        coming[1].copy_(self.out[coming[0]])
        return coming[1]

    def waited_s(self) -> float:
        return 0.5


def directed(above: int = 0, **changes: Any) -> tuple[nn.Module, Copying, Traffic]:
    it, lanes = model(depth=4, **changes), Copying()
    traffic = Traffic(above, lambda device: lanes)
    traffic._lanes = lanes
    traffic.direct(list(it.backbone.blocks), compiled=False)  # type: ignore[arg-type, union-attr]
    return it, lanes, traffic


def batch(it: nn.Module) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def blocks_of(lanes: Copying) -> list[set[int]]:
    """The numbers that each block sent, by where the blocks end."""
    found: list[set[int]] = [set()]
    for what, number in lanes.events:
        if what == "settle":
            found.append(set())
        elif what == "send":
            found[-1].add(number)
    return [block for block in found if block]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_comes_back_is_what_was_saved(dropout: float) -> None:
    it, lanes, _ = directed(dropout=dropout)
    plain = model(depth=4, dropout=dropout)
    for one in (it, plain):
        for _ in range(2):
            torch.manual_seed(3)
            one(*batch(one)).backward()
    assert lanes.out
    for ours, theirs in zip(it.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_the_block_before_is_fetched_while_one_is_in_backward() -> None:
    it, lanes, _ = directed()
    loss = it(*batch(it))
    blocks = blocks_of(lanes)
    assert len(blocks) == 3  # of four: the last one's tensors stay
    assert [e for e in lanes.events if e[0] == "settle"] == [("settle", 1)] * 3 + [("settle", 0)]
    begun = len(lanes.events)
    loss.backward()
    events = lanes.events[begun:]
    first_wait = {b: min(i for i, (w, n) in enumerate(events) if w == "wait" and n in blocks[b]) for b in range(3)}
    fetches = {b: [i for i, (w, n) in enumerate(events) if w == "fetch" and n in blocks[b]] for b in range(3)}
    assert {len(f) for f in fetches.values()} <= {len(b) for b in blocks}
    assert max(fetches[2]) < first_wait[2]
    assert max(fetches[1]) < first_wait[2]  # before the block after it goes on, so that both go at once
    assert first_wait[2] < min(fetches[0]) < max(fetches[0]) < first_wait[1]  # but no more than two are on the device
    assert sum(w == "wait" for w, _ in events) == sum(w == "fetch" for w, _ in events)


def test_each_storage_moves_once_and_parameters_never() -> None:
    it, lanes, traffic = directed()
    addresses = {p.untyped_storage()._cdata for p in it.parameters()}
    seen: list[int] = []
    real = lanes.send
    lanes.send = lambda storage: (seen.append(storage._cdata), real(storage))[1]  # type: ignore[method-assign]
    loss = it(*batch(it))
    assert len(seen) == len(set(seen))
    assert not addresses & set(seen)
    loss.backward()
    moved = sum(lanes.sizes) * 2
    assert traffic.stats() == {"offload_gb": moved / 1e9, "offload_wait_s": 0.5}
    assert traffic.stats()["offload_gb"] == 0


def test_what_is_small_and_what_all_blocks_share_stays() -> None:
    it, lanes, _ = directed(above=1000)
    tokens, labels = batch(it)
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    documents[:, 5:] = 1
    it(tokens, labels, documents).backward()
    assert lanes.sizes
    assert min(lanes.sizes) > 1000
    it, lanes, _ = directed()
    width = next(iter(it.parameters())).shape[1]
    it(tokens, labels, documents).backward()
    mask = 2 * 12 * 12
    assert mask not in lanes.sizes
    assert lanes.sizes.count(2 * 12 * width * 8) >= 3  # float64 hidden states do move


def test_nothing_is_held_when_a_pass_is_over_or_broken_off() -> None:
    it, lanes, traffic = directed()
    it(*batch(it)).backward()
    gc.collect()
    assert not traffic._seen
    loss = it(*batch(it))
    assert traffic._seen
    del loss
    gc.collect()
    assert not traffic._seen
    with torch.no_grad():
        before = len(lanes.events)
        it(*batch(it))
        assert len(lanes.events) == before


def test_a_storage_at_the_place_of_one_that_has_gone_is_another() -> None:
    """Identity is not the address: what was sent out is freed, and the next tensor may lie where it lay."""
    lanes = Copying()
    traffic = Traffic(0, lambda device: lanes)

    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                x = (x * 1.01) ** 2  # saves a tensor that nobody else holds
            return x

    blocks = [Squares(), Squares()]
    traffic._lanes = lanes
    traffic.direct(list(blocks), compiled=False)
    x = torch.full((64,), 0.9, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(blocks[1](blocks[0](x)).sum(), x)
    (theirs,) = torch.autograd.grad(Squares()(Squares()(x)).sum(), x)
    assert torch.equal(ours, theirs)
    assert len(lanes.out) >= 50


def test_on_a_cpu_nothing_is_copied() -> None:
    it = OffloadActivations(above_mb=0).apply(model(depth=3))
    lanes = HostLanes()
    storage = torch.zeros(10).untyped_storage()
    assert _bytes(storage, torch.device("cpu")).tolist() == [0] * 40
    assert lanes.wait(lanes.fetch(lanes.send(storage))) is storage
    it(*batch(it)).backward()
    assert it.memory_stats[0]()["offload_gb"] > 0  # type: ignore[index, operator, union-attr]
