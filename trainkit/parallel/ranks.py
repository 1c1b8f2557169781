"""The processes of a run as one of them sees it, and the few questions that a task or a loop may ask of the others."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.errors import FAILED, RanOutError, again
from trainkit.fingerprint import fingerprint
from trainkit.parallel.divided import Divided
from trainkit.parallel.group import Group, LostRankError
from trainkit.parallel.meeting import in_words
from trainkit.parallel.mesh import Mesh
from trainkit.parallel.pace import Pace, straggler
from trainkit.parallel.replicate import Replicas
from trainkit.parallel.roll import Roll
from trainkit.parallel.sizes import Sizes
from trainkit.slices import Cut


@dataclass
class Ranks:
    """`device` is where this rank computes. `host` is for words between the ranks in the loop, `saving` for those of a
    save that goes on behind it. With `stream` the parameters' home is the host.

    `kind` is what ranks with different rows have of the model: all of it (ddp) or slices (fsdp). `sizes` are those of the
    mesh; None: all ranks have different rows. `how` carries what else the config says (trainkit.parallel.Parallel).
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    host: Group = field(default_factory=Group)
    saving: Group = field(default_factory=Group)
    kind: str = "single"
    stream: bool = False
    sizes: Sizes | None = None
    how: Any = None
    roll: Roll | None = None
    pace: Pace = field(init=False)
    replicas: Replicas | None = None
    divided: Divided | None = None  # what ranks of one replica share
    slow: int | None = None  # the rank of which was said that it is slow
    careful: bool = False  # sums begin when every rank has said that its memory was enough

    def __post_init__(self) -> None:
        self.pace = Pace(self.device)
        axis = "dp_shard" if self.kind == "fsdp" else "dp_replicate"
        self.sizes = self.sizes or Sizes(**{axis: self.size})
        self._mesh: Mesh | None = None

    @property
    def mesh(self) -> Mesh:
        """All ranks by axis; made when it is first asked for, by all of them."""
        if self._mesh is None:
            assert self.sizes is not None
            self._mesh = Mesh(self.device, self.sizes, sharded=self.kind == "fsdp")
        return self._mesh

    def at(self, axis: str) -> int:
        """This rank's place along an axis of the mesh."""
        assert self.sizes is not None
        return self.sizes.at(self.rank)[axis]

    @property
    def readers(self) -> int:
        """How many ranks, or groups of ranks, have different rows of a batch."""
        assert self.sizes is not None
        return self.sizes.data

    @property
    def reader(self) -> int:
        """Which of them this rank is, or belongs to."""
        assert self.sizes is not None
        return self.at("dp_replicate") * self.sizes.dp_shard + self.at("dp_shard")

    @property
    def reads(self) -> bool:
        """Whether this rank is the first of those that have its rows."""
        return self.at("tp") == self.at("cp") == self.at("pp") == 0

    @property
    def mixed(self) -> bool:
        """Whether ranks share more than rows, so that they wait for each other inside a forward."""
        assert self.sizes is not None
        return self.sizes.mixed

    @property
    def home(self) -> torch.device:
        """Where parameters, gradients and the optimizer's state live."""
        return torch.device("cpu") if self.stream else self.device

    @property
    def first(self) -> bool:
        """Whether this rank prints, and touches the run's folder."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks that have different rows."""
        return self._summed(tensor, ("dp_replicate", "dp_shard")) if self.readers > 1 else tensor

    def anywhere(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks."""
        return self._summed(tensor, None) if self.size > 1 else tensor

    def _summed(self, tensor: Tensor, axes: tuple[str, ...] | None) -> Tensor:
        tensor = tensor.clone()
        group = self.mesh.group(*axes) if axes and self.mixed else None
        with self.pace.waiting():
            dist.all_reduce(tensor, group=group)
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may lie in slices on the ranks, in one piece."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor

    def norm(self, of: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients, where `of` gives that of those of some parameters, or of this rank's slices of them."""

        if self.divided is None:
            return self.whole(of(parameters))
        return self.divided.norm(lambda some: self.whole(of(some)), parameters)

    def own(self, gradients: Sequence[Tensor], norm: Tensor) -> Tensor:
        """What this rank alone answers for of the gradients, as one number: its replica's before they were summed, or its
        slices of them; alone it is their `norm`."""
        if self.replicas is not None:
            return self.replicas.own()
        return fingerprint(gradients) if self.kind == "fsdp" or self.mixed else norm

    @property
    def stages(self) -> list[nn.Module]:
        """This rank's stages of a pipeline, if there is one."""
        piped = self.divided is not None and self.divided.pipeline is not None
        return list(self.divided.pipeline.stages.values()) if piped else []  # type: ignore[union-attr]

    @property
    def slices(self) -> bool:
        """Whether a rank has less than the whole model."""
        assert self.sizes is not None
        return self.kind == "fsdp" or self.sizes.tp * self.sizes.pp > 1

    def divide(self, model: nn.Module, cuts: Callable[[int, int], Mapping[str, Cut]]) -> None:
        """Leave of `model`, in place, what is this rank's. `cuts(rank, size)` says which rows and columns of its parameters
        one of several tensor-parallel ranks has."""
        assert self.sizes is not None
        if self.mixed:
            self.divided = Divided(self.mesh, self.sizes, self.sizes.at(self.rank), getattr(self.how, "schedule", None))
            self.divided.apply(model, cuts)
        if self.kind == "fsdp":
            from trainkit.parallel import fsdp  # takes a second, which only those who shard should wait for

            options = {} if self.how is None else {"reshard": self.how.reshard, "prefetch": self.how.prefetch}
            fsdp.shard(model, self.mesh.data(), self.device, roots=self.stages, stream=self.stream, **options)

    def replicate(self, model: nn.Module) -> None:
        """Sum the gradients of `model`, which has all its memory, over ranks with the same part of it."""
        assert self.sizes is not None
        if self.kind != "fsdp" and self.sizes.data * self.sizes.cp > 1:
            self.replicas = Replicas(model, self.mesh.group("dp_replicate", "cp") if self.mixed else None)

    def sum_next(self, model: Any, last: bool) -> None:
        """Say before a backward whether it is the step's last one, in which gradients are summed over the ranks."""
        if self.kind == "fsdp" and not self.stages:
            model.set_requires_gradient_sync(last or self.stream)  # else whole gradients would wait on the device
        elif self.replicas is not None:
            self.replicas.sum_next(last and not self.careful)

    def finish_sums(self) -> None:
        """Wait for the sums of gradients, after the step's last backward.

        Raises:
            RanOutError: a careful step, and another rank ran out of memory in it.
        """
        if self.careful and not self.all_fit(True):
            raise RanOutError("another rank ran out of memory")
        if self.replicas is not None:
            if self.careful or self.stages:
                self.replicas.sum_next(True)
            self.replicas.finish()
        if self.divided is not None:
            self.divided.sum()

    @property
    def can_go_back(self) -> bool:
        """Whether ranks can forget a step that broke off on one of them, before gradients are summed."""
        return self.kind == "ddp" and not self.mixed

    def straggler(self) -> str | None:
        """Which rank keeps the others waiting, in words, when it is another one than when this was asked last."""
        if self.size == 1:
            return None
        found, before = straggler(self.host.gather(self.pace.read())), self.slow
        self.slow = found[0] if found else None
        if not found or found[0] == before:
            return None
        return f"rank {found[0]} takes {found[1]:.1f} times as long as the others for its part"

    def all_fit(self, fits: bool) -> bool:
        """Whether every rank's memory was enough for what they all tried."""
        return self.host.max(int(not fits)) == 0

    def lost(self, error: BaseException) -> LostRankError | None:
        """Why `error` was raised here, if that is because other ranks are not there any more: which."""
        if getattr(error, "exit_code", FAILED) != FAILED or not isinstance(error, Exception):
            return None
        absent = self.absent()
        return LostRankError(f"{absent}: killed, or its machine or network is gone{again()}") if absent else None

    def absent(self) -> str:
        """`rank 2 does not answer any more`, in words, or nothing where all do."""
        missing = self.roll.missing() if self.roll is not None else []
        if missing is None:  # the first rank's machine keeps the store
            whose = (
                "this machine's own address"
                if os.environ.get("GROUP_RANK", str(self.rank)) == "0"
                else "the machine of rank 0"
            )
            return f"{whose} ({os.environ.get('MASTER_ADDR')}) does not answer any more"
        does = "does" if len(missing) == 1 else "do"
        return f"{in_words(missing)} {does} not answer any more" if missing else ""

    def leave(self) -> None:
        """Part from the other ranks, when all are done."""
        if self.roll is not None:
            self.roll.end()
        if dist.is_initialized():
            if self.size > 1:
                dist.barrier(group=self.host.process_group)  # gloo may abort a rank whose peers are still busy
            dist.destroy_process_group()
