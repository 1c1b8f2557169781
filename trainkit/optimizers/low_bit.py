"""AdamW and SGD whose states are kept in few bits: each parameter's are decoded, stepped and encoded a chunk at a time, so
that they never exist whole in float32. Compiled, that is one kernel a chunk.

With no format the states are plain numbers: the same arithmetic as torch's own optimizers, to rounding, for gradients of
another dtype than the parameters'.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizers import formats, sharded
from trainkit.optimizers.formats import BLOCK, CODES, SIGNED, Code

CPU_CHUNK, GPU_CHUNK = 1 << 18, 1 << 25  # numbers stepped at once: what a core's cache holds, and what fills a GPU
COMPILED_CHUNK = 1 << 20  # where less lies in between


@dataclass(frozen=True)
class Keeping:
    """How states are kept: the `format` of matrices' states (null: as numbers), and whether the step is compiled."""

    format: str | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Rule:
    """An update's arithmetic. `factors(group, steps)` are what it needs a parameter (n, k), and `update(p, g, states,
    factors)` gives the new parameter and states."""

    moments: tuple[str, ...]
    counts: bool  # whether it needs to know how many updates were made
    factors: Callable[[dict[str, Any], Tensor], Tensor]
    update: Callable[[Tensor, Tensor, Sequence[Tensor], Tensor], tuple[Tensor, list[Tensor]]]


@cache
def adamw(beta1: float, beta2: float, eps: float) -> Rule:
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""

    def factors(group: dict[str, Any], steps: Tensor) -> Tensor:
        lr = group["lr"]
        shrink = torch.full_like(steps, 1 - lr * group["weight_decay"])
        return torch.stack([shrink, lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()], 1)

    def update(p: Tensor, g: Tensor, states: Sequence[Tensor], by: Tensor) -> tuple[Tensor, list[Tensor]]:
        m = torch.lerp(states[0], g, 1 - beta1)
        v = states[1] * beta2 + (1 - beta2) * g * g
        return p * by[0] - by[1] * m / (v.sqrt() / by[2] + eps), [m, v]

    return Rule(("exp_avg", "exp_avg_sq"), True, factors, update)


@cache
def sgd(momentum: float, nesterov: bool) -> Rule:
    """Sutskever et al. 2013, as torch.optim.SGD has it; weight decay is part of the gradient."""

    def factors(group: dict[str, Any], steps: Tensor) -> Tensor:
        return torch.stack([torch.full_like(steps, group["weight_decay"]), torch.full_like(steps, group["lr"])], 1)

    def update(p: Tensor, g: Tensor, states: Sequence[Tensor], by: Tensor) -> tuple[Tensor, list[Tensor]]:
        g = g + by[0] * p
        if not momentum:
            return p - by[1] * g, []
        velocity = momentum * states[0] + g
        return p - by[1] * (g + momentum * velocity if nesterov else velocity), [velocity]

    return Rule(("momentum_buffer",) if momentum else (), False, factors, update)


class LowBit(torch.optim.Optimizer):
    """An optimizer that steps by `rule`. State of a matrix: `<moment>_<format>`, codes as uint8 in the parameter's shape
    (4 bits: half its columns), and `<moment>_<format>_scale`, float32; of anything smaller `<moment>`, as numbers. Where
    the rule counts, `step` is a float32 scalar on the parameter's device.

    An update is left out where `found_inf`, which torch's fused optimizers take as well, is 1: no device is waited for.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], rule: Rule, keeping: Keeping) -> None:
        super().__init__(list(groups), {"fused": True})  # torch's word for a step count that lies beside the weights
        self.rule, self.keeping = rule, keeping

    def format_of(self, parameter: Tensor) -> str | None:
        """The format that this parameter's states are kept in."""
        return self.keeping.format if formats.fits(parameter) else None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        skip = self.found_inf
        if skip is not None and skip.device.type == "cpu":
            if skip.item():
                return
            skip = None
        for group in self.param_groups:
            todo = [p for p in group["params"] if p.grad is not None]
            if todo:
                self._step_group(group, todo, skip)

    def _step_group(self, group: dict[str, Any], todo: list[Tensor], skip: Tensor | None) -> None:
        for p in todo:
            if p not in self.state:
                self.state[p] = self._begun(p)
        if self.rule.counts:
            steps = [self.state[p]["step"] for p in todo]
            torch._foreach_add_(steps, 1 if skip is None else [1 - skip] * len(steps))
            counted = torch.stack(steps).double()
        else:
            counted = torch.zeros(len(todo), dtype=torch.float64, device=todo[0].device)
        factors = self.rule.factors(group, counted)
        for p, by in zip(todo, factors, strict=True):
            self._step_one(p, by, skip)

    def _begun(self, p: Tensor) -> dict[str, Any]:
        here, format_ = sharded.local(p), self.format_of(p)
        state = {"step": torch.zeros((), dtype=torch.float32, device=here.device)} if self.rule.counts else {}
        if format_ is not None:
            sharded.refuse_cut_blocks(p)
        for moment in self.rule.moments:
            if format_ is None:
                state[moment] = torch.zeros_like(p)
            else:
                code = CODES[format_][SIGNED[moment]]
                both = zip(("", "_scale"), formats.empty(code, here), formats.columns(code, p.shape[-1]))
                state |= {f"{moment}_{format_}{end}": sharded.beside(p, part, last) for end, part, last in both}
        return state

    def _step_one(self, p: Tensor, by: Tensor, skip: Tensor | None) -> None:
        here, grad, state, format_ = sharded.local(p), sharded.local(p.grad), self.state[p], self.format_of(p)  # type: ignore[arg-type]
        if here.numel() == 0:
            return
        by = by.to(torch.promote_types(here.dtype, torch.float32))
        if format_ is None:
            states = [[sharded.local(state[moment]).view(-1)] for moment in self.rule.moments]
            step = _kernel(self.rule, None, self.keeping.compiled)
            for some in _chunks([here.view(-1), grad.reshape(-1), *(s[0] for s in states)], self._chunk(here)):
                step(some[0], some[1], [[s] for s in some[2:]], by, skip)
            return
        names = [f"{moment}_{format_}" for moment in self.rule.moments]
        states = [[_rows(sharded.local(state[n + end])) for end in ("", "_scale")] for n in names]
        rows = [_rows(here), grad.flatten(0, -2), *(t for both in states for t in both)]
        for blocks, compiled in _in_blocks(rows, CODES[format_][True], here.shape[-1]):
            step = _kernel(self.rule, format_, self.keeping.compiled and compiled)
            for some in _chunks(blocks, max(1, self._chunk(here) // blocks[0][0].numel())):
                step(some[0], some[1], [some[i : i + 2] for i in range(2, len(some), 2)], by, skip)

    def _chunk(self, here: Tensor) -> int:
        if here.device.type != "cpu":
            return GPU_CHUNK
        return COMPILED_CHUNK if self.keeping.compiled else CPU_CHUNK


def _rows(tensor: Tensor) -> Tensor:
    """A view of it as a matrix: what is written there must be written to it."""
    return tensor if tensor.ndim == 2 else tensor.view(-1, tensor.shape[-1])


def _in_blocks(rows: list[Tensor], code: Code, width: int) -> Iterator[tuple[list[Tensor], bool]]:
    """Parameter, gradient, and codes and scales of every state, as blocks, and whether they are alike in all matrices:
    where rows are whole blocks the layout is (blocks, 128), whatever the matrix was."""
    if width % BLOCK == 0 and all(t.is_contiguous() for t in rows):
        blocks = rows[0].numel() // BLOCK
        yield [t.view(blocks) if i > 2 and i % 2 else t.view(blocks, -1) for i, t in enumerate(rows)], True
        return
    for of_numbers, of_codes, of_scales, block in formats.pieces(code, width):
        views = [t[:, of_numbers].unflatten(-1, (-1, block)) for t in rows[:2]]
        for i, t in enumerate(rows[2:]):
            views.append(t[:, of_scales] if i % 2 else t[:, of_codes].unflatten(-1, (views[0].shape[1], -1)))
        yield views, False


def _chunks(tensors: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    for begin in range(0, len(tensors[0]), size):
        yield [t[begin : begin + size] for t in tensors]


@cache
def _kernel(rule: Rule, format_: str | None, compiled: bool) -> Callable[..., None]:
    """The step of some blocks, in place: `p` and `g` (..., width), `states` codes and scales, or numbers."""
    codes = [CODES[format_][SIGNED[moment]] if format_ else None for moment in rule.moments]

    def step(p: Tensor, g: Tensor, states: list[list[Tensor]], by: Tensor, skip: Tensor | None) -> None:
        wide = by.dtype
        old = [
            s[0].to(wide) if code is None else code.decode(s[0], s[1], p.shape[-1]).to(wide)
            for s, code in zip(states, codes)
        ]
        new_p, new = rule.update(p.to(wide), g.to(wide), old, by)
        encoded = [[n] if code is None else list(code.encode(n)) for n, code in zip(new, codes)]
        for place, value in [(p, new_p), *((s, e) for both in zip(states, encoded) for s, e in zip(*both))]:
            value = value.to(place.dtype)
            place.copy_(value if skip is None else torch.where(skip > 0, place, value))

    if not compiled:
        return step
    fast = torch.compile(step, fullgraph=True)

    def marked(p: Tensor, g: Tensor, states: list[list[Tensor]], by: Tensor, skip: Tensor | None) -> None:
        for tensor in (p, g, *(t for both in states for t in both)):
            if len(p) > 1:
                torch._dynamo.mark_dynamic(tensor, 0)  # one kernel for matrices of all sizes
        fast(p, g, states, by, skip)

    return marked
