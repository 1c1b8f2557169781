"""The real step of a run, traced on fake tensors: two updates, an evaluation, a token of a sample, a save, a resume."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainkit import states
from trainkit.checkpoint.tensors import dtype_name
from trainkit.learner import MODEL, OPTIMIZER, Learner
from trainkit.models import Decoder
from trainkit.models.attention import Cache
from trainkit.parallel.pipeline import microbatches
from trainkit.plan import pretend
from trainkit.plan.kernels import Device, Work
from trainkit.plan.live import CATEGORIES, STEP, Live, plain
from trainkit.plan.stand_ins import standing_in
from trainkit.run import Run
from trainkit.slices import chunks
from trainkit.tasks import Embedding
from trainkit.tasks.causal_lm import evaluating

Numbers = dict[tuple[str, ...], float]  # what was found, by name. In the depth, each of them is linear
Seconds = Callable[[list[Work]], float]


def trace(
    run: Run,
    device: Device,
    seconds: Seconds,
    *,
    documents: bool,
    depth: int | None = None,
    until: float | None = None,
    rank: int = 0,
    size: int = 1,
) -> Numbers:
    """What `run` takes as this one of `size` ranks, whose work takes `seconds`.

    Args:
        documents: rows hold several documents.
        depth: of the model, instead of its own.
        until: when `time.monotonic()` is at this, it ends with OutOfTimeError.

    Returns:
        `("peak", phase, part, category)`, also with the category `total`, `("host",)`, `("saved",)` and, between
        steps, `("resident",)` in bytes; `("seconds", phase)`, and so `flops` and `moved` bytes of a step; `("parameters",)`;
        `("sent", axes, collective)` bytes, and `("talked", axes, collective)` seconds of it. Of a pipeline, seconds are those
        of a rank that never waits, and there is no evaluation.
    """
    if depth is not None:
        assert isinstance(run.model, Decoder)  # another's is traced whole
        run = replace(run, model=replace(run.model, depth=depth))
    with pretend.pretending(run, device, rank, size) as ranks:
        rows = run.data.batch // ranks.readers
        work = Steps.of(run, rows, ranks.sizes.pp if ranks.sizes else 1)
        with Live(device, until, ranks.sizes) as live, standing_in(live):
            with live.unseen():
                batches = pretend.Batches(run, device.torch, {work.first, work.traced, rows}, documents=documents)
            if device.cuda:  # a CPU's batch lies in NumPy's memory
                live.held["activations"] += batches.bytes(rows)
            with live.during("building"):
                it = pretend.learner(run, ranks, batches)
            live.watch(it.model, it.optimizer)
            batches.rows = work.first
            it.train_step()  # makes the optimizer's state
            live.forget()
            batches.rows = work.traced
            it.train_step()
            numbers = _of_work(live.done, seconds, work)
            numbers |= {("resident",): sum(live.held.values())}
            if ranks.stages:
                described: dict[str, Any] = {}
            else:
                _beside_steps(run, it, live, batches, rows)
                described = {name: _described(tensor) for name, tensor in _checkpoint(it).items()}
            held = [part for tensor in _checkpoint(it).values() for _, _, part in chunks(tensor)]
            numbers |= {("saved",): sum(p.nbytes for tensor in held for p in plain(tensor))}
            numbers |= {("parameters",): sum(p.numel() for p in it.model.parameters())}
        numbers |= _of_memory(live) | {("host",): max(live.host_peaks.values())}
    return numbers | (_of_resuming(run, device, batches, described, until, rank, size) if described else {})


@dataclass(frozen=True)
class Steps:
    """How a step goes through the model: in `parts`; the rows of those that are traced in the `first` step, and in the second,
    and how many parts those are."""

    parts: int
    first: int
    traced: int
    count: int
    piped: bool = False

    @classmethod
    def of(cls, run: Run, rows: int, stages: int) -> "Steps":
        """Of a replica's rows. A pipeline is full with as many microbatches as it has stages, and of twice as many the later
        ones find gradients; all of them are in flight in `gpipe`."""
        micro = microbatch(run, rows)
        if stages == 1:
            parts = -(-rows // micro)
            return cls(parts, 1, min(rows, 2 * micro), min(parts, 2))
        parts = microbatches(rows, micro, stages)
        count = parts if run.parallel.schedule == "gpipe" else min(parts, 2 * stages)
        each = rows // parts
        return cls(parts, stages * each, count * each, count, piped=True)


def _beside_steps(run: Run, it: Learner, live: Live, batches: pretend.Batches, rows: int) -> None:
    batches.rows = rows
    with live.during("evaluation"):
        _evaluate(run, it, batches.at(0))
    if run.evaluation.sample_tokens and run.task.writes:
        _sample(it, live, min(run.evaluation.sample_tokens, run.model.context))


def _checkpoint(it: Learner) -> dict[str, Any]:
    """The tensors of a checkpoint, or this rank's parts of them, but for a few numbers."""
    tensors = {MODEL + name: tensor for name, tensor in states.of_model(it.model).items()}
    return tensors | {OPTIMIZER + k: v for k, v in states.of_optimizer(it.model, it.optimizer).items()}


def _evaluate(run: Run, it: Learner, batch: Mapping[str, Tensor]) -> None:
    """An evaluation of one batch. What is measured of vectors is of their numbers, which are not there, and on the host."""
    if isinstance(run.task, Embedding):
        with evaluating(it.model):
            run.task.embed(it.model, batch)
    else:
        it.evaluate([batch], stop=lambda: False)


def _described(tensor: Any) -> dict[str, Any]:
    """As a manifest describes a tensor that lies in one file."""
    shape = list(tensor.shape)
    return {"shape": shape, "dtype": dtype_name(tensor.dtype), "parts": [["it", [0] * len(shape), shape]]}


def microbatch(run: Run, rows: int) -> int:
    """How many of a rank's rows go through the model at once; where the run has yet to find out, all of them."""
    said = run.memory.microbatch
    return min(said, rows) if isinstance(said, int) else rows


def _of_memory(live: Live) -> Numbers:
    found: Numbers = {}
    for (phase, part), peak in live.peaks.items():
        found["peak", phase, part, "total"] = peak.bytes
        found |= {("peak", phase, part, category): peak.by_category.get(category, 0) for category in CATEGORIES}
    return found


def _of_work(done: list[Work], seconds: Seconds, steps: Steps) -> Numbers:
    """Of a step that was traced in part: all microbatches but the last are as the first, and in a pipeline all are alike."""
    found: Numbers = {}

    def times(work: Work) -> float:
        if work.phase == "update" or (steps.piped and work.line is not None and "dp" in work.line.axes):
            return 1.0
        if steps.piped:
            return steps.parts / steps.count
        return steps.parts - 1.0 if work.forward == 1 and steps.parts > 1 else 1.0

    for phase in STEP:
        own = [w for w in done if w.phase == phase]
        by_times = {n: [w for w in own if times(w) == n] for n in {times(w) for w in own}}
        for name, of in (("seconds", seconds), ("flops", _flops), ("moved", _moved)):
            found[name, phase] = sum(n * of(some) for n, some in by_times.items())
    for axes, called in {(w.line.axes, w.collective) for w in done if w.line}:
        some = [w for w in done if w.line and (w.line.axes, w.collective) == (axes, called)]
        found["sent", axes, called] = sum(times(w) * w.times * w.sent for w in some)
        found["talked", axes, called] = sum(times(w) * seconds([w]) for w in some)
    return found


def _flops(done: list[Work]) -> float:
    return sum(w.times * w.flops for w in done)


def _moved(done: list[Work]) -> float:
    return sum(w.times * w.moved for w in done)


def _sample(it: Learner, live: Live, tokens: int) -> None:
    """One token after `tokens` others."""
    caches: Any = [Cache() for _ in it.model.backbone.blocks]  # type: ignore[union-attr]  # a task's model has them
    device = it.ranks.device
    with evaluating(it.model), torch.no_grad():
        if tokens > 1:
            with live.unseen():
                it.model(torch.empty(1, tokens - 1, dtype=torch.int64, device=device), caches=caches, seen=0)
        with live.during("sample"):
            it.model(torch.empty(1, 1, dtype=torch.int64, device=device), caches=caches, seen=tokens - 1)


def _of_resuming(
    run: Run,
    device: Device,
    batches: pretend.Batches,
    described: Mapping[str, Any],
    until: float | None,
    rank: int,
    size: int,
) -> Numbers:
    with pretend.pretending(run, device, rank, size) as ranks, Live(device, until) as live, standing_in(live):
        with live.during("building"):
            it = pretend.learner(run, ranks, batches)
        live.watch(it.model, it.optimizer)
        with live.during("resume"):
            places = it.places(described)
            moments = {k.removeprefix(OPTIMIZER): v for k, v in places.items() if k.startswith(OPTIMIZER)}
            states.load_optimizer(it.model, it.optimizer, moments)
    return _of_memory(live)
