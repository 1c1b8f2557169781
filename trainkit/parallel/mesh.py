"""One mesh of all ranks, and the groups along its axes (https://pytorch.org/docs/stable/distributed.html#devicemesh)."""

from functools import cached_property
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainkit.parallel.sizes import Sizes


class Mesh:
    """The ranks along `sizes`. Axes of one rank are left out, unless parameters are to be `sharded` over one."""

    def __init__(self, device: torch.device, sizes: Sizes, *, sharded: bool) -> None:
        kept = {a: n for a, n in sizes.by_axis().items() if n > 1 or (a == "dp_shard" and sharded and sizes.cp == 1)}
        self._axes = tuple(kept)
        self._mesh = init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=self._axes)
        self._joined: dict[tuple[str, ...], DeviceMesh] = {}

    def group(self, *axes: str) -> Any:
        """The ranks that differ along these axes only; None where that is all of them."""
        there = self._there(axes)
        if there == self._axes:
            return None
        return self._along(there).get_group()

    def along(self, *axes: str) -> int:
        """How many ranks differ along these axes only."""
        there = self._there(axes)
        return 1 if not there else self._mesh.size() if there == self._axes else self._along(there).size()

    def data(self) -> DeviceMesh:
        """What FSDP shards over: one dimension, or replicas and slices."""
        if "dp_replicate" not in self._axes:
            return self._along(self._there(("dp_shard", "cp")))
        if "cp" not in self._axes:
            return self._mesh["dp_replicate", "dp_shard"]
        return self._joined_slices

    @cached_property
    def _joined_slices(self) -> DeviceMesh:
        """Replicas and slices, where positions are slices as well: torch slices no axes that were joined."""
        there = {axis: self._mesh.size(i) for i, axis in enumerate(self._axes)}
        joined = {"dp_replicate": there["dp_replicate"], "slices": there.get("dp_shard", 1) * there["cp"]}
        kept = {a: there[a] for a in ("pp",) if a in there} | joined | {a: there[a] for a in ("tp",) if a in there}
        whole = init_device_mesh(self._mesh.device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))
        return whole["dp_replicate", "slices"]

    def _there(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in self._axes if axis in axes)

    def _along(self, axes: tuple[str, ...]) -> DeviceMesh:
        if axes not in self._joined:
            part = self._mesh if axes == self._axes else self._mesh[axes if len(axes) > 1 else axes[0]]
            self._joined[axes] = part._flatten("_".join(axes)) if len(axes) > 1 else part
        return self._joined[axes]
