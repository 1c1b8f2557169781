"""Pipeline parallelism: ranks have different layers, and microbatches go through them one behind the other, by the schedules of
torch.distributed.pipelining: GPipe (Huang et al. 2019, arXiv:1811.06965), 1F1B and interleaved 1F1B (Narayanan et al. 2021,
arXiv:2104.04473), zero-bubble and its V-shaped form (Qi et al. 2023, arXiv:2401.10241).

Grade: reordered. B rows, T positions, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
ENDS = ("embed", "position", "norm", "head")
_TORCH = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
SPLIT = ("zero_bubble", "zbv")  # which take the gradients of weights after those of what came in
SEVERAL = {"interleaved": 2, "zero_bubble": 2, "zbv": 2}  # stages on each rank


def stages_of(schedule: str, rank: int, size: int) -> tuple[int, ...]:
    """Which of the pipeline's stages a rank has. In a V the second half of them goes back from the last rank."""
    if schedule == "zbv":
        return rank, 2 * size - 1 - rank
    return tuple(rank + size * turn for turn in range(SEVERAL.get(schedule, 1)))


def microbatches(total: int, rows: int, size: int) -> int:
    """Into how many equal microbatches of at most `rows` a replica's `total` rows go: a multiple of the stages' ranks, so
    that every schedule can go through them."""
    return next((n for n in range(size, total + 1, size) if total % n == 0 and total // n <= rows), total)


class Stage(nn.Module):
    """Some blocks of a model, with what comes before the first and after the last one. `forward(x, tokens_BT, labels_BT,
    documents_BT)`: `x` is the hidden states of the stage before (BTD), or the tokens; the last one gives the loss (1,)."""

    def __init__(self, model: Any, layers: Sequence[str], *, first: bool, last: bool) -> None:
        super().__init__()
        self._of = (model,)  # not as a child, whose parameters these are not all of
        self.first, self.last = first, last
        self._layers = [int(name) for name in layers]
        self.blocks = nn.ModuleList(model.backbone.blocks._modules[name] for name in layers)
        has = dict(zip(ENDS, (first or (last and model.backbone.head is None), first, last, last), strict=True))
        ends = [getattr(model.backbone, name) for name in ENDS if has[name]]
        self.ends = nn.ModuleList(module for module in ends if module is not None)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        caches: Any = None,
        seen: int = 0,
    ) -> Tensor:
        (model,) = self._of
        backbone, part = model.backbone, None
        if model.vocabulary is not None:
            model.vocabulary.see(tokens, cached=caches is not None)
        if model.positions is not None:
            part = model.positions.part(tokens.shape[1]) if labels is not None else model.positions.whole()
        around = backbone.around(tokens, documents, seen, part)
        if self.first:
            x = backbone.enter(tokens if part is None else tokens[:, part], around)
        for number, (layer, block) in enumerate(zip(self._layers, self.blocks, strict=True)):
            shared = around.shared(x, layer)
            x = block(x, *shared) if caches is None else block(x, *shared, caches[number])
        if not self.last:
            return x
        x = backbone.norm(x)
        if labels is None:
            return model.logits(x if caches is None else x[:, -1:])
        loss = model.loss(x, labels if part is None else labels[:, part])
        return torch.stack([loss if part is None else model.positions.sum(loss)])


class Pipeline:
    """The stages of one rank, and what goes through all of them. Every rank gives it the same rows."""

    def __init__(self, model: Any, group: Any, rank: int, size: int, schedule: Schedule) -> None:
        self._group, self._rank, self._size, self._schedule = group, rank, size, schedule
        self._model, self._runs = (model,), {}  # type: tuple[Any], dict[tuple[int, ...], Any]
        self._weigh: Callable[[Tensor], Tensor] = lambda loss: loss
        self._losses: list[Tensor] = []
        numbers = stages_of(schedule, rank, size)
        self.count = size * len(numbers)
        backbone, names = model.backbone, list(model.backbone.blocks._modules)
        each = len(names) // self.count
        mine = {number: names[number * each : (number + 1) * each] for number in numbers}
        self.stages = {
            number: Stage(model, own, first=number == 0, last=number == self.count - 1) for number, own in mine.items()
        }
        for name in names:  # the others go; these keep their names, which are those of a whole model
            if not any(name in own for own in mine.values()):
                del backbone.blocks._modules[name]
        here = {id(module) for stage in self.stages.values() for module in stage.ends}
        for name in ENDS:
            if getattr(backbone, name) is not None and id(getattr(backbone, name)) not in here:
                setattr(backbone, name, None)
        model.pipeline = self

    def backward(self, batch: Mapping[str, Tensor], rows: int, weigh: Callable[[Tensor], Tensor]) -> Tensor:
        """Add the gradients of `weigh(loss)` to the parameters, at most `rows` rows at a time, and give the sum of the rows'
        losses, detached, which every rank then knows."""
        tokens, labels = batch["tokens"], batch["labels"]
        count = microbatches(len(tokens), rows, self._size)
        self._weigh, self._losses = weigh, []
        given = {name: batch[name] for name in ("tokens", "labels", "documents") if name in batch}
        run = self._run(count, len(tokens) // count, tokens)
        run.step(*((tokens,) if 0 in self.stages else ()), target=labels if self._ends_here else None, **given)
        losses = torch.stack(self._losses).sum() if self._ends_here else torch.zeros((), device=tokens.device)
        return self._told(losses.to(self._wide))

    def forward(
        self, tokens: Tensor, labels: Tensor | None, documents: Tensor | None, caches: Any, seen: int
    ) -> Tensor:
        """What a whole model's forward gives, stage after stage and without gradients, on every rank."""
        x, taken = tokens, 0
        for number in range(self.count):
            owner, after = self._owner(number), self._owner(number + 1)
            if number in self.stages:
                stage = self.stages[number]
                own = None if caches is None else caches[taken : taken + len(stage.blocks)]
                taken += len(stage.blocks)
                x = stage(x, tokens, labels, documents, own, seen)
            if owner == after or number + 1 == self.count:
                continue
            shape = torch.tensor(x.shape if owner == self._rank else [0, 0, 0], device=tokens.device)
            if owner == self._rank:
                dist.send(shape, group=self._group, group_dst=after)
                dist.send(x.contiguous(), group=self._group, group_dst=after)
            elif after == self._rank:
                dist.recv(shape, group=self._group, group_src=owner)
                x = torch.empty(shape.tolist(), dtype=self._dtype, device=tokens.device)
                dist.recv(x, group=self._group, group_src=owner)
        whole = (tokens.shape[0], 1 if caches is not None else tokens.shape[1], self._model[0].backbone.cfg.vocab)
        if not self._ends_here:
            x = torch.empty(whole if labels is None else (1,), device=tokens.device)
        found = self._told(x.to(self._wide))
        return found if labels is None else found[0]

    def _run(self, count: int, rows: int, tokens: Tensor) -> Any:
        """A schedule of `count` microbatches of `rows` rows. Shapes are said beforehand, so that nobody has to find out."""
        key = (count, rows, tokens.shape[1])
        if key not in self._runs:
            from torch.distributed import pipelining

            (model,) = self._model
            length = tokens.shape[1] // (model.positions.size if model.positions is not None else 1)
            length //= model.vocabulary.size if model.vocabulary is not None else 1
            ids = torch.empty(rows, tokens.shape[1], dtype=torch.int64, device="meta")
            hidden = torch.empty(rows, length, model.backbone.cfg.width, dtype=self._dtype, device="meta")
            hidden.requires_grad_()  # or no gradients of it are sent back
            loss = torch.empty(1, dtype=self._wide, device="meta", requires_grad=True)
            stages = [
                pipelining.PipelineStage(
                    stage,
                    number,
                    self.count,
                    tokens.device,
                    input_args=(ids if stage.first else hidden,),
                    output_args=(loss if stage.last else hidden,),
                    group=self._group,
                )
                for number, stage in self.stages.items()
            ]
            make = getattr(pipelining, _TORCH[self._schedule])
            several = stages if self._schedule in SEVERAL else stages[0]
            self._runs[key] = make(several, count, loss_fn=self._weighed, scale_grads=False)
        return self._runs[key]

    def _weighed(self, loss: Tensor, labels: Tensor) -> Tensor:
        self._losses.append(loss.detach()[0])
        return self._weigh(loss[0])

    def _owner(self, number: int) -> int:
        """Which rank has a stage."""
        return next((r for r in range(self._size) if number in stages_of(self._schedule, r, self._size)), -1)

    def _told(self, x: Tensor) -> Tensor:
        """What the rank with the last stage has, on every rank."""
        dist.broadcast(x, group=self._group, group_src=self._owner(self.count - 1))
        return x

    @property
    def apart(self) -> bool:
        """Whether the first and the last stage are on different ranks."""
        return self._owner(0) != self._owner(self.count - 1)

    @property
    def _ends_here(self) -> bool:
        return self.count - 1 in self.stages

    @property
    def _dtype(self) -> torch.dtype:
        """That of hidden states between blocks."""
        return next(self._model[0].parameters()).dtype

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._dtype, torch.float32)
