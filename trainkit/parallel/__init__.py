"""Which processes train together. torchrun starts them; torch.distributed carries what they say."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from annotated_types import Ge

from trainkit.config import Count, Natural, config
from trainkit.parallel import together
from trainkit.parallel.auto import chosen
from trainkit.parallel.group import ElsewhereError, Group, LostRankError
from trainkit.parallel.meeting import TIMEOUT, agree, differing, meeting
from trainkit.parallel.pace import straggler
from trainkit.parallel.pipeline import SEVERAL, SPLIT, Schedule
from trainkit.parallel.ranks import Ranks
from trainkit.parallel.roll import Roll
from trainkit.parallel.sizes import AXES, OWN, Shape, Sizes, refuse, sizes

Size = Annotated[int, Ge(-1)]
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}  # of NCCL: what each rank waits for
TRIED = ("causal_lm", "mlm", "embedding")  # tasks, of which `together` says what they cannot

__all__ = ["ElsewhereError", "Group", "LostRankError", "Parallel", "Ranks", "Shape", "Sizes", "differing", "straggler"]


@config
class Parallel:
    """`single`: one process. `ddp`: a replica of the model on every rank. `fsdp`: every rank a slice of it. `hsdp`: replicas in
    slices. `tp`, `pp`, `cp`: ranks share layers, the depth, or rows' positions.

    These are presets of one mesh, whose sizes can be given as well, in any mixture: `dp_replicate` replicas in `dp_shard`
    slices, each in `pp` stages, whose layers are shared by `tp` ranks and whose positions by `cp`. -1 is the rest of the
    ranks, which is what the preset's own size is where nothing else is.

    `auto` chooses the sizes by arithmetic (trainkit/parallel/auto.py).

    `schedule` is that of a pipeline: gpipe, 1f1b, interleaved, zero_bubble or zbv. `reshard`: whether slices of a block are
    let go of after its forward (or a number of ranks that keep them between them). `prefetch`: how many blocks ahead are put
    together (null: as FSDP2 sees fit). `device`: auto (CUDA where there is one), cpu, cuda or cuda:N. `replicas`, groups
    that come and go without a restart, is refused: see docs/parallel.md.
    """

    kind: Literal["single", "ddp", "fsdp", "hsdp", "tp", "pp", "cp", "auto"] = "single"
    device: str = "auto"
    dp_replicate: Size | None = None
    dp_shard: Size | None = None
    tp: Size | None = None
    pp: Size | None = None
    cp: Size | None = None
    schedule: Schedule = "1f1b"
    reshard: bool | Count = True
    prefetch: Natural | None = None
    replicas: Count | None = None

    def __post_init__(self) -> None:
        if self.replicas is not None:
            raise ValueError(
                "parallel.replicas would make what is learned depend on who was there, and torchft unpickles what other "
                "machines send: use nodes=1:2 with restarts=, which goes on from the newest checkpoint"
            )
        given = self.given()
        if zero := [axis for axis, n in given.items() if n == 0]:
            raise ValueError(f"parallel.{zero[0]}=0 is no size: use 1 for none, or -1 for the rest")
        rest = [axis for axis, n in given.items() if n == -1]
        if len(rest) > 1:
            raise ValueError(
                f"parallel.{rest[0]} and parallel.{rest[1]} cannot both be the rest: say how many one of them is"
            )
        if self.kind == "auto" and given:
            raise ValueError(f"parallel=auto chooses all sizes: leave parallel.{next(iter(given))} out, or name a kind")
        own = OWN.get(self.kind)
        if rest and own not in (None, *given):
            raise ValueError(f"parallel={self.kind} and parallel.{rest[0]}=-1: say how many parallel.{own} is")
        if self.schedule in SPLIT and "pp" in self.shared and self.shards:
            raise ValueError(
                f"parallel.schedule={self.schedule} takes the gradients of weights by themselves, which FSDP2 does not see: "
                f"use parallel.schedule=interleaved, or parallel=ddp with parallel.pp"
            )

    def given(self) -> dict[str, int]:
        """The sizes that a person gave."""
        return {axis: n for axis in AXES if (n := getattr(self, axis)) is not None}

    @property
    def shards(self) -> bool:
        """Whether ranks with different rows have slices of the model."""
        return self.kind in ("fsdp", "hsdp") or self.dp_shard not in (None, 1)

    @property
    def copies(self) -> bool:
        """Whether gradients of whole parameters are summed over ranks."""
        return not self.shards and (self.kind in ("ddp", "cp") or {self.dp_replicate, self.cp} - {None, 1} != set())

    @property
    def shared(self) -> set[str]:
        """What ranks share beside rows: axes of the mesh."""
        return {axis for axis in together.MIXED if self.kind == axis or getattr(self, axis) not in (None, 1)}

    def check_run(self, **run: Any) -> None:
        """Raise ValueError, in one sentence, where something in the rest of a run cannot be shared so."""
        if self.shared and (task := run["task"].kind) not in TRIED:
            raise ValueError(
                f"task={task} was not tried on ranks that share more than rows: use parallel=fsdp or parallel=ddp"
            )
        checkpoint = run["memory"].checkpoint
        if self.schedule in SPLIT and "pp" in self.shared and checkpoint and checkpoint.selective:
            raise ValueError(
                f"parallel.schedule={self.schedule} goes back through a block twice, and memory=selective once: "
                f"use memory=checkpoint, or parallel.schedule=interleaved"
            )
        together.refuse(self.shared | ({"fsdp"} if self.shards else set()), **run)

    def sizes(self, world: int | None = None, machines: int | None = None) -> Sizes:
        """The mesh of `world` ranks on so many `machines`; None: as torchrun started them.

        Raises:
            UserError: they do not divide so.
        """
        started = int(os.environ.get("WORLD_SIZE", "1"))
        here = max(1, started // int(os.environ.get("LOCAL_WORLD_SIZE", started)))
        return sizes(self.kind, self.given(), world or started, machines or here)

    def check(self, shape: Shape | None = None) -> None:
        """Raise UserError when the ranks that torchrun started, or the `shape` of the model and the data, do not divide."""
        found = self.sizes()
        if shape is not None:
            refuse(found, shape, SEVERAL.get(self.schedule, 1))

    def settled(self, shape: Shape, *, batch: int, state: int, memory: int) -> "Parallel":
        """What `auto` is on the ranks that torchrun started; any other kind is itself. `state`: bytes of the model and its
        optimizer; `memory`: bytes of a machine's device.

        Raises:
            UserError: there is no mesh for them.
        """
        if self.kind != "auto":
            return self
        world, machine = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        found = chosen(world, machine, shape, batch, state, memory)
        kind = "fsdp" if found.dp_shard > 1 else "ddp" if found.dp_replicate > 1 else "single"
        return replace(self, kind=kind, **found.by_axis())  # type: ignore[arg-type]  # one of its kinds

    def join(self, device: torch.device, *, stream: bool = False, facts: Mapping[str, str] | None = None) -> Ranks:
        """Meet the other ranks that torchrun started; without torchrun there are none. To `stream` parameters from the
        host is FSDP's work, on one rank too.

        Raises:
            UserError: the `facts` that all have to have in common are others on some ranks; the sizes do not divide.
        """
        size, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
        if size == 1 and not (stream or self.shards):
            self.sizes()
            return Ranks(device=device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
            for name, value in FLIGHT_RECORDER.items():
                os.environ.setdefault(name, value)
        backend = "nccl" if device.type == "cuda" else "gloo"
        backend = "cpu:gloo,cuda:nccl" if stream and device.type == "cuda" else backend  # norms are summed on the host
        store = meeting()
        if size > 1:
            agree(store, rank, size, facts or {})
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        host, saving = (
            Group(rank, size, dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None) for _ in range(2)
        )
        roll = Roll(store, rank, size) if size > 1 else None
        return self.lay_out(Ranks(device, rank, size, host, saving, roll=roll), stream=stream)

    def lay_out(self, ranks: Ranks, *, stream: bool = False) -> Ranks:
        """Ranks that have met, on this mesh."""
        kind = "fsdp" if stream or self.shards else "ddp" if self.copies else "single"
        return replace(ranks, kind=kind, stream=stream, sizes=self.sizes(ranks.size), how=self)
