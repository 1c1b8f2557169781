"""The real step of a run, traced on fake tensors: two updates, an evaluation, a token of a sample, a save, a resume."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainkit.checkpoint.tensors import dtype_name
from trainkit.learner import MODEL, OPTIMIZER, Learner
from trainkit.models import Decoder
from trainkit.models.attention import Cache
from trainkit.optimizers.state import load_named_state, named_state
from trainkit.parallel import Ranks
from trainkit.plan import pretend
from trainkit.plan.kernels import Device, Work
from trainkit.plan.live import CATEGORIES, STEP, Live, plain
from trainkit.plan.stand_ins import standing_in
from trainkit.run import Run
from trainkit.tasks import Embedding

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
) -> Numbers:
    """What `run` takes as one of `device.ranks` ranks, whose work takes `seconds`.

    Args:
        documents: rows hold several documents.
        depth: of the model, instead of its own.
        until: when `time.monotonic()` is at this, it ends with OutOfTimeError.

    Returns:
        `("peak", phase, part, category)`, also with the category `total`, `("host",)`, `("saved",)` and, between
        steps, `("resident",)` in bytes; `("seconds", phase)`, and so `flops`, `moved` and `sent` bytes of a step;
        `("parameters",)`.
    """
    if depth is not None:
        assert isinstance(run.model, Decoder)  # another's is traced whole
        run = replace(run, model=replace(run.model, depth=depth))
    stream = run.memory.stream is not None
    kind = "fsdp" if stream else run.parallel.kind
    ranks = Ranks(device=device.torch, size=device.ranks, kind=kind, stream=stream)
    rows = run.data.batch // device.ranks
    micro = microbatch(run, rows)
    with pretend.pretending(device, ranks), Live(device, until) as live, standing_in(live):
        with live.unseen():
            batches = pretend.Batches(run, device.torch, {1, min(rows, 2 * micro), rows}, documents=documents)
        if device.cuda:  # a CPU's batch lies in NumPy's memory
            live.held["activations"] += batches.bytes(rows)
        with live.during("building"):
            it = pretend.learner(run, ranks, batches)
        live.watch(it.model, it.optimizer)
        it.train_step()  # makes the optimizer's state
        live.forget()
        batches.rows = min(rows, 2 * micro)
        it.train_step()
        numbers = _of_work(live.done, seconds, parts=-(-rows // micro))
        numbers |= {("resident",): sum(live.held.values())}
        batches.rows = rows
        with live.during("evaluation"):
            _evaluate(run, it, batches.at(0))
        if run.evaluation.sample_tokens and run.task.writes:
            _sample(it, live, min(run.evaluation.sample_tokens, run.model.context))
        held = _checkpoint(it)
        numbers |= {("saved",): sum(part.nbytes for tensor in held.values() for part in plain(tensor))}
        numbers |= {("parameters",): sum(p.numel() for p in it.model.parameters())}
        described = {name: _described(tensor) for name, tensor in held.items()}
    numbers |= _of_memory(live) | {("host",): max(live.host_peaks.values())}
    return numbers | _of_resuming(run, device, ranks, batches, described, until)


def _evaluate(run: Run, it: Learner, batch: Mapping[str, Tensor]) -> None:
    """An evaluation of one batch. What is measured of vectors is of their numbers, which are not there, and on the host."""
    if isinstance(run.task, Embedding):
        it.model.eval()
        run.task.embed(it.model, batch)
        it.model.train()
    else:
        it.evaluate([batch], stop=lambda: False)


def _described(tensor: Tensor) -> dict[str, Any]:
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


def _of_work(done: list[Work], seconds: Seconds, parts: int) -> Numbers:
    """Of a step of `parts` microbatches that was traced with two: all but the last are as the first."""
    found: Numbers = {}
    for phase in STEP:
        once = [w for w in done if w.phase == phase and (w.forward != 1 or parts == 1)]
        often = [w for w in done if w.phase == phase and w.forward == 1 and parts > 1]
        for name, of in (("seconds", seconds), ("flops", _flops), ("moved", _moved), ("sent", _sent)):
            key = (name, phase)
            found[key] = of(once) + (parts - 1) * of(often)
    return found


def _flops(done: list[Work]) -> float:
    return sum(w.times * w.flops for w in done)


def _moved(done: list[Work]) -> float:
    return sum(w.times * w.moved for w in done)


def _sent(done: list[Work]) -> float:
    return sum(w.times * w.sent for w in done)


def _sample(it: Learner, live: Live, tokens: int) -> None:
    """One token after `tokens` others."""
    training = it.model.training
    it.model.eval()
    caches: Any = [Cache() for _ in it.model.backbone.blocks]  # type: ignore[union-attr]  # a task's model has them
    device = it.ranks.device
    with torch.no_grad():
        if tokens > 1:
            with live.unseen():
                it.model(torch.empty(1, tokens - 1, dtype=torch.int64, device=device), caches=caches, seen=0)
        with live.during("sample"):
            it.model(torch.empty(1, 1, dtype=torch.int64, device=device), caches=caches, seen=tokens - 1)
    it.model.train(training)


def _checkpoint(it: Learner) -> dict[str, Tensor]:
    """The tensors of a checkpoint, but for a few numbers."""
    tensors = {MODEL + name: tensor.detach() for name, tensor in it.model.state_dict().items()}
    return tensors | {OPTIMIZER + k: v for k, v in named_state(it.model, it.optimizer).items()}


def _of_resuming(
    run: Run, device: Device, ranks: Ranks, batches: pretend.Batches, described: Mapping[str, Any], until: float | None
) -> Numbers:
    with pretend.pretending(device, ranks), Live(device, until) as live, standing_in(live):
        with live.during("building"):
            it = pretend.learner(run, ranks, batches)
        live.watch(it.model, it.optimizer)
        with live.during("resume"):
            places = it.places(described)
            states = {k.removeprefix(OPTIMIZER): v for k, v in places.items() if k.startswith(OPTIMIZER)}
            load_named_state(it.model, it.optimizer, states)
    return _of_memory(live)
