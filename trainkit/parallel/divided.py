"""What the ranks of one replica share, beyond rows: layers, positions, stages. And what they have to agree on after a step's
backward: gradients of what all of them hold, and one norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainkit.parallel import context, tensor
from trainkit.parallel.mesh import Mesh
from trainkit.parallel.sizes import Sizes
from trainkit.slices import Cut, Layout


class Divided:
    """One rank's part of a model; `at` is its place along each axis."""

    def __init__(self, mesh: Mesh, sizes: Sizes, at: Mapping[str, int]) -> None:
        self._mesh, self._sizes, self._at = mesh, sizes, at
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
        here = frozenset(model.state_dict())
        model.layout = Layout(shapes, self._cuts, here)  # type: ignore[assignment]  # not a module

    def sum(self) -> None:
        """Sum the gradients of parameters that every tensor-parallel rank has, of its own positions or heads."""
        if self._sizes.tp > 1:
            _sum([p for p in self._parameters(cut=False) if p.grad is not None], self._mesh.group("tp"))

    def norm(self, of: Callable[[Sequence[Tensor]], Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The norm over all ranks of one replica, where `of` gives that of those of some parameters."""
        if self._sizes.tp == 1:
            return of(parameters)
        squares = [of(self._parameters(cut=cut)).double().square() for cut in (True, False)]
        dist.all_reduce(squares[0], group=self._mesh.group("tp"))
        return (squares[0] + squares[1]).sqrt()

    def _parameters(self, *, cut: bool) -> list[Tensor]:
        return [p for n, p in self._model.named_parameters() if p.requires_grad and (n in self._cuts) == cut]


def _sum(parameters: Sequence[Tensor], group: Any) -> None:
    """Sum gradients over a group, all at once."""
    whole: list[Any] = [p.grad for p in parameters]
    grads = [g.to_local() if hasattr(g, "to_local") else g for g in whole]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(total.view_as(grad))
