"""Ranks that are not there: torch's fake process group under the mesh that training would make, and what a collective of
some of them costs, by where they are.

A machine has `NODE` cards, and ranks are numbered machine by machine, as torchrun does.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from trainkit.parallel import Ranks, Sizes
from trainkit.parallel.sizes import AXES

NODE = 8
GROUPS = (("tp",), ("cp",), ("pp",), ("dp_replicate", "cp"), ("dp_replicate", "dp_shard"))  # that a learner may ask for


@dataclass(frozen=True)
class Line:
    """Ranks that talk: along which axes they lie, how many there are, and how many of them are on one machine."""

    axes: str
    size: int
    near: int

    @property
    def machines(self) -> int:
        """On how many machines they are."""
        return math.ceil(self.size / self.near)

    @property
    def waited_for(self) -> bool:
        """Whether a forward or a backward stands still until they have talked: where they share layers or positions."""
        return self.axes in ("tp", "cp")


@contextmanager
def started(ranks: int, machine: int = NODE) -> Iterator[None]:
    """Inside, torchrun seems to have started so many, as many as fit on each `machine`."""
    here = min(ranks, machine)
    with mock.patch.dict(os.environ, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(here)):
        yield


@contextmanager
def others(ranks: Ranks) -> Iterator[None]:
    """All other ranks. The mesh has to be made of real numbers, so before anything is fake."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=ranks.rank, world_size=ranks.size)
    try:
        ranks.mesh.data() if ranks.kind == "fsdp" else None
        for axes in GROUPS:
            if ranks.mesh.along(*axes) > 1:
                ranks.mesh.group(*axes)
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # which knows groups of a mesh by the names that they had


def looked_at(sizes: Sizes) -> list[int]:
    """The ranks that take most: the last one of those that share positions, which sees all of them, and of a pipeline the
    first, where most microbatches wait, and the last, which makes the loss."""
    each = sizes.world // sizes.pp
    first = (sizes.cp - 1) * sizes.tp
    return sorted({first, first + (sizes.pp - 1) * each})


def group_of(args: Any) -> Any:
    """The process group among the arguments of a collective, by itself or by its name."""
    for arg in reversed(args):
        if isinstance(arg, str):
            return dist.distributed_c10d._resolve_process_group(arg)  # type: ignore[arg-type]  # a name is one
        if isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith("c10d.ProcessGroup"):
            return dist.ProcessGroup.unbox(arg)
    return None


def of_ranks(ranks: Iterable[int], sizes: Sizes) -> Line:
    """The line that these ranks make."""
    known = list(ranks)
    places = [sizes.at(rank) for rank in known]
    axes = [axis for axis in AXES if len({place[axis] for place in places}) > 1]
    near = max(sum(rank // NODE == machine for rank in known) for machine in {rank // NODE for rank in known})
    return Line(" × ".join(axes), len(known), near)
