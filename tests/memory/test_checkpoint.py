"""What a checkpointed block keeps and what it computes twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from tests.memory.allocated import most_allocated
from tests.test_models import model
from trainkit import memory
from trainkit.memory import Memory
from trainkit.memory.checkpoint import Checkpoint, _policy


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def ran(strategy: Checkpoint | None) -> Counter[str]:
    it = model(depth=4)
    it = strategy.apply(it) if strategy else it
    ids = torch.randint(0, 40, (2, 12))
    with Counted() as counted:
        it(ids, ids).backward()
    return counted.calls


def test_each_way_runs_again_what_it_says() -> None:
    plain, every, second = ran(None), ran(Checkpoint()), ran(Checkpoint(every=2))
    selective = ran(Checkpoint(selective=True))
    attention = next(name for name in plain if name.startswith("_scaled_dot_product") and "backward" not in name)
    assert every[attention] == 2 * plain[attention]
    assert second[attention] == plain[attention] + 2
    assert selective[attention] == plain[attention]
    assert selective["mm"] == plain["mm"]
    assert every["mm"] > plain["mm"]
    assert every["mul"] >= selective["mul"] > plain["mul"]  # the cheap rest


def test_less_is_held_the_more_is_run_again() -> None:
    sizes = {}
    for name, strategy in {
        "none": None,
        "selective": Checkpoint(selective=True),
        "second": Checkpoint(every=2),
        "every": Checkpoint(),
    }.items():
        it = model(depth=6, width=64, vocab=64)
        it = strategy.apply(it) if strategy else it
        ids = torch.randint(0, 64, (4, 32))
        sizes[name] = most_allocated(lambda it=it, ids=ids: it(ids, ids).backward())
    assert sizes["every"] < sizes["second"] < sizes["none"]
    assert sizes["every"] < sizes["selective"] < sizes["none"]
    assert sizes["every"] < 0.5 * sizes["none"]


@pytest.mark.parametrize("name", ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"])
def test_attention_that_drops_out_is_run_again(name: str) -> None:
    """A GPU's kernels draw inside; leaving one draw out would shift those that come after it."""
    operator = getattr(torch.ops.aten, name).default
    inputs = [torch.zeros(1)] * 3 + ([None, True] if "efficient" in name else [])
    assert _policy(None, operator, *inputs) == CheckpointPolicy.MUST_SAVE
    assert _policy(None, operator, *inputs, 0.0, True) == CheckpointPolicy.MUST_SAVE
    assert _policy(None, operator, *inputs, 0.1, True) == CheckpointPolicy.PREFER_RECOMPUTE
    assert _policy(None, operator, *inputs, dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert _policy(None, torch.ops.aten.mul.Tensor, *inputs[:2]) == CheckpointPolicy.PREFER_RECOMPUTE


def test_a_budget_is_the_compilers_and_goes_with_the_model() -> None:
    import torch._functorch.config as compiler

    Memory(checkpoint=Checkpoint(budget=0.25)).apply(model())
    assert compiler.activation_memory_budget == 0.25
    Memory().apply(model())
    assert compiler.activation_memory_budget == 1.0
    assert Checkpoint(budget=0.5).grade == "reordered"
    assert Checkpoint().grade == "exact"


def test_blocks_that_are_run_again_are_compiled() -> None:
    it = Memory(checkpoint=Checkpoint()).apply(model(depth=2), compiled=True)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for block in it.backbone.blocks:  # type: ignore[union-attr]
        block.compile(backend=backend)
    ids = torch.randint(0, 40, (2, 12))
    try:
        it(ids, ids).backward()
    finally:
        torch._dynamo.reset()
    assert graphs
    assert memory.stats(it) == {}
