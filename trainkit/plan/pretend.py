"""A learner that is real but for its numbers: built by `build.learner` on fake tensors, for a device that need not be here.

A GPU's tensors are fakes on `cpu:1`: torch's CPU kernels are the ones that every build knows, and a number of its own
tells the device's tensors from the host's. What CUDA does otherwise is in `stand_ins` and `kernels`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from trainkit import build
from trainkit.learner import Learner
from trainkit.parallel import Ranks
from trainkit.plan.kernels import Device
from trainkit.plan.world import others, started
from trainkit.run import Run
from trainkit.tasks import Embedding


@dataclass(frozen=True)
class Rows:
    """A run's data as far as a plan needs to know it."""

    length: int
    batch: int
    batches: "Batches"
    gives: str

    def build(self, corpus: Any, *, seed: int, ranks: Any, device: torch.device) -> "Batches":
        """The loader."""
        return self.batches


class Batches:
    """A loader whose batches have shapes only. With `documents` rows hold several, which makes masks explicit. A row of pairs
    is two texts, or three where a loss needs them, as long as they may be."""

    def __init__(self, run: Run, device: torch.device, rows: Iterable[int], *, documents: bool) -> None:
        self.batch, self.tokens_per_step = run.data.batch, run.data.batch * run.data.length
        self._length, self._documents = run.data.length, documents
        self._task, self._width = run.task, run.model.width
        self._made = {count: self._of(count, device) for count in rows}
        self.rows = min(self._made)

    def at(self, step: int) -> dict[str, Tensor]:
        """`rows` rows, whatever the step is."""
        return self._made[self.rows]

    def _of(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        if isinstance(self._task, Embedding):
            return self._of_pairs(self._task, rows, device)
        shapes = {"tokens": torch.int64, "labels": torch.int64}
        shapes |= {"documents": torch.int32} if self._documents else {}
        batch = {k: torch.empty(rows, self._length, dtype=dtype, device=device) for k, dtype in shapes.items()}
        return batch | {name: torch.empty(rows, dtype=torch.int64, device=device) for name in ("ids", "bytes")}

    def _of_pairs(self, task: Embedding, rows: int, device: torch.device) -> dict[str, Tensor]:
        texts = 3 if task.loss == "triplet" else 2
        shapes: dict[str, tuple[int, ...]] = {f"tokens{column}": (rows, self._length) for column in range(texts)}
        shapes |= {"lengths": (rows, texts), "texts": (rows, texts), "ids": (rows,)}
        batch = {name: torch.empty(shape, dtype=torch.int64, device=device) for name, shape in shapes.items()}
        more = {"scores": (rows,), "teacher": (rows, texts, task.projection or self._width)}
        return batch | {name: torch.empty(shape, device=device) for name, shape in more.items()}

    def bytes(self, rows: int) -> int:
        """What such a batch takes on the device."""
        return sum(tensor.nbytes for tensor in self._made[rows].values())


def _zeros(tensor: Tensor, real: Any = Tensor.tolist) -> Any:
    """What a fake tensor's numbers are, where somebody asks for a list of them."""
    return [0.0] * tensor.numel() if isinstance(tensor, FakeTensor) else real(tensor)


@contextmanager
def pretending(run: Run, device: Device, rank: int, size: int) -> Iterator[Ranks]:
    """Inside, new tensors are fake, and so are all ranks but this one."""
    stream = run.memory.stream is not None
    with ExitStack() as stack, started(size):
        ranks = run.parallel.lay_out(Ranks(device.torch, rank, size), stream=stream)
        if size > 1 or ranks.kind == "fsdp":
            stack.enter_context(others(ranks))
            stack.enter_context(_sharding_on(device))
            stack.enter_context(_agreeing())
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _replaced))
        stack.enter_context(mock.patch.object(Tensor, "tolist", _zeros))
        yield ranks


@contextmanager
def _sharding_on(device: Device) -> Iterator[None]:
    """FSDP on a device that torch may not know."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard

    with (
        mock.patch.object(_fully_shard, "_get_device_from_mesh", return_value=device.torch),
        mock.patch.object(_fsdp_init, "_move_states_to_device", _moved),
    ):
        yield


@contextmanager
def _agreeing() -> Iterator[None]:
    """The stages of a pipeline ask each other whether all of them know the shapes of what they send: they do."""
    from torch.distributed.pipelining import PipelineStage

    with ExitStack() as stack:
        for name in ("_warmup_forward_vote", "_warmup_backward_result"):
            if hasattr(PipelineStage, name):  # torch 2.13 has it
                told = mock.Mock(return_value=SimpleNamespace(item=lambda: 1))
                stack.enter_context(mock.patch.object(PipelineStage, name, told))
        yield


def learner(run: Run, ranks: Ranks, batches: Batches) -> Learner:
    """The learner of `run`, not compiled."""
    rows = Rows(run.data.length, run.data.batch, batches, run.data.gives)
    pretended: Any = replace(run, data=rows, compile="off")  # type: ignore[arg-type]  # it only has to build a loader
    return build.learner(pretended, SimpleNamespace(vocab=0), ranks)


def _moved(parameters: Iterable[Any], buffers: Iterable[Any], device: torch.device) -> None:
    """What FSDP does first. A fake tensor that is given another's memory still says that it is where it was."""
    for tensor in (*parameters, *buffers):
        if tensor.device != device and not tensor.is_meta:  # which is given memory once it is in slices
            tensor.data = tensor.detach().to(device)
            tensor.fake_device = device


def _replaced(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for fake parameters, which torch cannot swap in place."""
    found: dict[int, nn.Parameter] = {}
    modules: Sequence[nn.Module] = list(module.modules()) if recurse else [module]
    for one in modules:
        for name, parameter in one._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    new = convert(parameter)
                if new is not parameter:
                    made = found.setdefault(id(parameter), nn.Parameter(new, parameter.requires_grad))
                    one._parameters[name] = made
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = convert(buffer)
    return module
