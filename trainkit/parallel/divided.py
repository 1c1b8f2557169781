"""What the ranks of one replica share, beyond rows: layers, positions, stages. And what they have to agree on after a step's
backward: gradients of what all of them hold, and one norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.parallel import context, tensor
from trainkit.parallel.mesh import Mesh
from trainkit.parallel.pipeline import Pipeline
from trainkit.parallel.sizes import Sizes
from trainkit.slices import Cut, Layout


class Divided:
    """One rank's part of a model; `at` is its place along each axis."""

    def __init__(self, mesh: Mesh, sizes: Sizes, at: Mapping[str, int], schedule: Any) -> None:
        self._mesh, self._sizes, self._at, self._schedule = mesh, sizes, at, schedule
        self.pipeline: Any = None
        self._tied: Any = None  # the first and the last stage, which have the same embedding
        self._cuts: Mapping[str, Cut] = {}
        self._model: Any = None

    def apply(self, model: nn.Module, cuts: Callable[[int, int], Mapping[str, Cut]]) -> None:
        """Make `model` this rank's part of it, in place."""
        self._model, sizes = model, self._sizes
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        if sizes.tp > 1:
            self._cuts = cuts(self._at["tp"], sizes.tp)
            tensor.split(model, tensor.Tensors(self._mesh.group("tp"), self._at["tp"], sizes.tp), dict(self._cuts))
        if sizes.cp > 1:
            context.spread(model, context.Positions(self._mesh.group("cp"), self._at["cp"], sizes.cp))
        if sizes.pp > 1:
            self._pipe(model)
        here = frozenset(model.state_dict())
        model.layout = Layout(shapes, self._cuts, here)  # type: ignore[assignment]  # not a module

    def _pipe(self, model: nn.Module) -> None:
        group, place, size = self._mesh.group("pp"), self._at["pp"], self._sizes.pp
        head = model.backbone.head  # type: ignore[union-attr]  # a backbone's
        self.pipeline = Pipeline(model, group, place, size, self._schedule)
        if head is None and self.pipeline.apart:
            line = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
            ends = [line[0], line[-1]]
            found = dist.new_group(ends, use_local_synchronization=True) if place in (0, size - 1) else None
            self._tied = found

    def sum(self) -> None:
        """Sum the gradients of parameters that several ranks have: outside layers every tensor-parallel rank, of its own
        positions or heads; and an embedding that is the head as well, on the first and the last stage."""
        if self._sizes.tp > 1:
            _sum([p for p in self._parameters(cut=False) if p.grad is not None], self._mesh.group("tp"))
        if self._tied is not None:
            _sum([self._model.backbone.embed.weight], self._tied)

    def norm(self, of: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The norm over all ranks of one replica, where `of` gives that of those of some parameters."""
        counted_elsewhere = self._model.backbone.embed.weight if self._tied is not None and self._at["pp"] else None
        square = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for cut in (True, False):
            some = [p for p in self._parameters(cut=cut) if p is not counted_elsewhere]
            if some:
                own = of(some).double().square()
                square += _summed(own, self._mesh.group("tp")) if cut else own
        if self._sizes.pp > 1:
            square = _summed(square, self._mesh.group("pp"))
        return square.sqrt()

    def _parameters(self, *, cut: bool) -> list[Tensor]:
        return [p for n, p in self._model.named_parameters() if p.requires_grad and (n in self._cuts) == cut]


def _summed(square: Tensor, group: Any) -> Tensor:
    dist.all_reduce(square, group=group)
    return square


def _sum(parameters: Sequence[Tensor], group: Any) -> None:
    """Sum gradients over a group, all at once."""
    whole: list[Any] = [p.grad for p in parameters]
    grads = [g.to_local() if hasattr(g, "to_local") else g for g in whole]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
