"""From a Run to what runs it: every wire in the house, in the order in which it is pulled."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainkit import hardware, run as runs
from trainkit.checkpoint import Checkpointer
from trainkit.checkpoint.lock import RunLock
from trainkit.errors import UserError
from trainkit.learner import Learner, load_model
from trainkit.parallel import Ranks
from trainkit.run import Run
from trainkit.tasks.generate import generate
from trainkit.throughput import Meter
from trainkit.trainer import Trainer
from trainkit.units import human_bytes, human_count

Report = Callable[..., None]


def check(run: Run) -> None:
    """Refuse what can be seen to be wrong before anything is built or any data is read."""
    run.data.check()
    if (vocab := run.data.vocab()) is not None:
        _fits(vocab, run)


def ranks(run: Run) -> Ranks:
    """The processes of this run and their device."""
    return run.parallel.join(hardware.choose(run.parallel.device))


def learner(run: Run, corpus: Any, ranks: Ranks) -> Learner:
    """All that learns, and nothing that writes: enough for tests and benchmarks."""
    _fits(corpus.vocab, run)
    torch.manual_seed(run.seed)
    backbone = run.model.build()
    model = run.task.build(backbone).to(ranks.device)
    model = run.precision.apply(model, ranks.device)
    model = run.memory.apply(model)
    _compile(model, run.compile)
    loader = run.data.build(corpus, seed=run.seed, ranks=ranks, device=ranks.device)
    return Learner(
        task=run.task,
        model=model,
        optimizer=run.optimizer.build(model),
        schedule=run.schedule,
        loader=loader,
        ranks=ranks,
        scaler=run.precision.scaler(ranks.device),
        seed=run.seed,
        steps=run.steps,
        clip=run.clip,
        microbatch=run.memory.microbatch or run.data.batch,
    )


@contextmanager
def trainer(run: Run, folder: Path, report: Report | None = None) -> Iterator[Trainer]:
    """A learner and the folder that it keeps, locked for as long as this lasts.

    Everything a person can have got wrong is found before the folder is touched.

    Raises:
        UserError: wrong data, a name that is taken, another process on this run, a disk that cannot hold it.
        DamagedError: there are checkpoints and none is good.
    """
    runs.refuse_another(folder, run)
    check(run)
    with RunLock(folder):
        joined = ranks(run)
        corpus = run.data.open(report)
        it = learner(run, corpus, joined)
        checkpointer = run.checkpoint.build(folder, higher_is_better=run.evaluation.higher_is_better)
        checkpointer.preflight(sum(t.nbytes for t in it.tensors().values()))
        runs.claim(folder, run)
        trackers = run.tracking.build(folder)
        made = Trainer(
            learner=it,
            checkpointer=checkpointer,
            trackers=trackers,
            evaluation=run.evaluation,
            meter=Meter(
                tokens_per_step=it.loader.tokens_per_step,
                flops_per_token=run.model.flops_per_token(run.data.length),
                peak_flops=hardware.peak_flops(joined.device, run.precision.matmul_dtype()),
            ),
            log_every=run.tracking.every,
            stop_at=min(run.stop_at or run.steps, run.steps),
            memory_in_use=lambda: hardware.memory_in_use(joined.device),
            sample=_sampler(run, it, corpus) if run.evaluation.sample_tokens else None,
            facts=_facts(run, corpus),
            files={"run.yaml": run.yaml().encode(), "tokenizer.json": corpus.tokenizer.save()},
        )
        if (found := checkpointer.load_latest()) is not None:
            _same_data(found.state, corpus)
            made.restore(found.tensors, found.state)
        trackers.start(header(run, made, corpus), it.step, steps=made.stop_at, config=run.yaml())
        try:
            yield made
        finally:
            it.loader.close()


def header(run: Run, trainer: Trainer, corpus: Any) -> dict[str, str]:
    """What a person wants to see before a run starts."""
    it, device = trainer.learner, trainer.learner.ranks.device
    parameters = run.model.parameters()
    micro = min(it.microbatch, run.data.batch)
    accumulation = -(-run.data.batch // micro)
    return {
        "run": run.name,
        "model": f"{human_count(parameters)} parameters",
        "data": f"{corpus.name}: {human_count(corpus.train.tokens)} training tokens, {corpus.tokenizer.name} tokenizer",
        "device": f"{hardware.name(device)}, {human_count(trainer.meter.peak_flops)}FLOP/s measured",
        "batch": f"{micro} rows × {accumulation} accumulated × {it.ranks.size} rank = {run.data.batch} rows "
        f"of {run.data.length} = {human_count(trainer.meter.tokens_per_step)} tokens a step",
        "memory": run.memory.describe(),
        "state": human_bytes(sum(t.nbytes for t in it.tensors().values())) + " a checkpoint",
        "steps": f"{it.step} to {trainer.stop_at}" if it.step else f"{trainer.stop_at}",
    }


def _compile(model: torch.nn.Module, how: str) -> None:
    if how == "blocks":
        for block in model.backbone.blocks:  # type: ignore[union-attr]  # a task's model has a backbone of blocks
            block.compile()
    elif how == "full":
        model.compile()
