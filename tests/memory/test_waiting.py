"""A step never waits for the device: nothing in it asks for a number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainkit.learner import Learner

WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class Waits(TorchDispatchMode):
    """The operators that would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITS or indexed:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory", ["default", "fused_loss", "selective+offload_activations"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_asks_the_device_for_nothing(learner: Callable[..., Learner], memory: str, optimizer: str) -> None:
    what = ["memory.offload_activations.above_mb=0"] if "offload" in memory else []
    it = learner(f"memory={memory}", "memory.microbatch=2", "model.dropout=0.1", f"optimizer={optimizer}", *what)
    it.train_step()
    with Waits() as waits:
        for _ in range(2):
            it.train_step()
    if optimizer == "muon":  # torch's has no kernel that looks at `skip` on the device
        assert set(waits.seen) == {"_local_scalar_dense"}
        assert len(waits.seen) == 2
    else:
        assert waits.seen == []


def test_what_would_wait_is_seen() -> None:
    with Waits() as waits:
        x = torch.arange(4)
        assert int(x.sum()) == 6
        x[x > 1]
        x.nonzero()
        bool(x[0])
        x.tolist()
    assert len(waits.seen) >= 4
