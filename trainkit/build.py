"""From a Run to what runs it: every wire in the house, in the order in which it is pulled."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainkit import agreement, fitting, floors, hardware, logs, optimizers, spread, versions
from trainkit import history as history_file
from trainkit import run as runs
from trainkit import start as starts
from trainkit.checkpoint import Loaded, store
from trainkit.checkpoint.lock import RunLock
from trainkit.checkpoint.mirror import Mirror
from trainkit.errors import DamagedError, UserError, nearest
from trainkit.header import checkpoint_bytes, header
from trainkit.learner import Learner
from trainkit.notify import Notifier
from trainkit.parallel import Ranks
from trainkit.profile import Profiler
from trainkit.run import Run
from trainkit.sampling import stream
from trainkit.signals import Signals
from trainkit.throughput import Meter
from trainkit.tracking import Trackers
from trainkit.trainer import Trainer
from trainkit.watchdog import Watchdog

MIRROR_WAIT_S = 600.0  # for what is still being sent when a run ends
OTHERS_WAIT_S = 30.0  # for a save that may be waiting for a rank which is not there any more
Report = Callable[[int, int, str], None]


def check(run: Run) -> None:
    """Refuse what can be seen to be wrong before anything is built or any text is read.

    Raises:
        UserError: the data is not there, or its vocabulary does not fit the model.
    """
    run = spread.settled(run)
    spread.check(run)
    device = hardware.choose(run.parallel.device)
    run.precision.check(device)
    run.speed.check(device, run.precision.matmul_dtype())
    run.data.check()
    run.profile.check()
    if run.evaluation.metric not in (measured := run.task.measured(run.data)):
        raise UserError(
            f"evaluation.metric={run.evaluation.metric} needs pairs that the data does not hold out{nearest('', measured)}"
        )
    if (vocab := run.data.vocab()) is not None:
        _refuse_small_vocabulary(vocab, run)


def ranks(run: Run) -> Ranks:
    """The processes of this run and their device."""
    device = hardware.choose(run.parallel.device)
    run.speed.begin(device, run.precision.matmul_dtype())
    facts = agreement.facts(run, device)
    return spread.settled(run).parallel.join(device, stream=run.memory.stream is not None, facts=facts)


def learner(run: Run, corpus: Any, ranks: Ranks) -> Learner:
    """All that learns, and nothing that writes: enough for tests and benchmarks."""
    _refuse_small_vocabulary(corpus.vocab, run)
    model = spread.model(run, ranks)
    _compile(model, run.compile, "reduce-overhead" if run.speed.cuda_graphs else None)
    return Learner(
        task=run.task,
        model=model,
        optimizer=optimizers.build(
            run.optimizer, model, run.memory, compiled=run.compile != "off", rounding=run.precision.rounding
        ),
        schedule=run.schedule,
        loader=run.data.build(corpus, seed=run.seed, ranks=ranks, device=ranks.device),
        ranks=ranks,
        scaler=run.precision.scaler(ranks.device),
        seed=run.seed,
        steps=run.steps,
        clip=run.clip,
        microbatch=run.memory.microbatch if isinstance(run.memory.microbatch, int) else run.data.batch,
        guard=run.guard,
        exact=run.deterministic == "elastic",
    )


@contextmanager
def trainer(
    run: Run, folder: Path, *, start: Path | None = None, report: Report | None = None, signals: Signals | None = None
) -> Iterator[Trainer]:
    """A learner and the folder that it keeps, locked for as long as this lasts; it goes on from the newest checkpoint
    or from that of `start`. What a person can have got wrong is found before the folder is claimed.

    Only the first rank touches the folder, or prints. What it refuses all ranks leave for.

    Raises:
        UserError: wrong data, a name that is taken, another process on this run, a disk that cannot hold it.
        DamagedError: there are checkpoints and none is good.
    """
    run = starts.identified(run, folder)
    mistake = _mistake(run, folder) if int(os.environ.get("RANK", "0")) == 0 else None
    joined = ranks(run)
    joined.host.first_does(lambda: _refuse(mistake))  # by now, so that no other rank waits for one that left
    lock = RunLock(folder)
    joined.host.first_does(lambda: lock.__enter__() and None)
    error: BaseException | None = None
    try:
        with _trainer(run, folder, joined, start, report, signals or Signals(), lock) as made:
            yield made
    except BaseException as raised:
        error = raised
        if lost := joined.lost(raised):
            raise lost from raised
        raise
    finally:
        if joined.first:
            lock.__exit__(type(error) if error else None, error, None)
        if error is None:
            joined.leave()


def _mistake(run: Run, folder: Path) -> UserError | None:
    """What the first rank finds wrong, for all to leave for when they have met; alone it is raised."""
    try:
        runs.refuse_another(folder, run)
        check(run)
    except UserError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return error
    return None


def _refuse(mistake: UserError | None) -> None:
    if mistake is not None:
        raise mistake


@contextmanager
def _trainer(
    run: Run,
    folder: Path,
    joined: Ranks,
    start: Path | None,
    report: Report | None,
    signals: Signals,
    lock: RunLock,
) -> Iterator[Trainer]:
    trackers = run.tracking.build(folder) if joined.first else Trackers([])
    notifier = Notifier(run.notify if joined.first else (), run.name, trackers.note)
    corpus = _opened(run, joined, report)
    agreement.refuse_other_data(corpus, joined)
    it = learner(run, corpus, joined)
    mirror = None
    if joined.first and run.checkpoint.mirror:
        mirror = Mirror(run.checkpoint.mirror, folder, lambda text: trackers.note(text), differs=runs.differ)
    checkpointer = run.checkpoint.build(
        folder,
        higher_is_better=run.evaluation.higher_is_better,
        versions=versions.installed(),
        host=joined.host,
        saving=joined.saving,
        mirror=mirror,
        check_owner=lock.check,
    )
    checkpointer.preflight(checkpoint_bytes(it))
    joined.host.first_does(lambda: runs.claim(folder, run))
    if joined.size > 1:
        (logs.set_aside if joined.first else logs.divert)(folder, joined.rank)
    begin = time.perf_counter()
    found = checkpointer.load(start, it.places) if start else checkpointer.load_latest(it.places)
    signals.note = trackers.note
    made = Trainer(
        learner=it,
        checkpointer=checkpointer,
        checkpoint=run.checkpoint,
        trackers=trackers,
        evaluation=run.evaluation,
        guard=run.guard,
        signals=signals,
        watchdog=Watchdog(folder, joined.rank, run.guard.hang_s, joined.absent),
        meter=Meter(
            tokens_per_step=it.loader.tokens_per_step,
            flops_per_token=run.model.flops_per_token(run.data.length, head=run.task.head),
            peak_flops=hardware.peak_flops(joined.device, run.precision.matmul_dtype()) * joined.size,
        ),
        log_every=run.tracking.every,
        stop_at=min(run.stop_at or run.steps, run.steps),
        readings=lambda: hardware.readings(joined.device),
        sample=_sampler(run, it, corpus) if run.evaluation.sample_tokens and run.task.writes else None,
        remember=lambda history: history_file.write(folder, history) if joined.first else None,
        tell=notifier.tell,
        facts=_facts(corpus),
        files={runs.FILE: run.yaml().encode(), "tokenizer.json": corpus.tokenizer.save()},
        best=run.evaluation.best(),
        profiler=run.profile.build(folder / "profile", it, trackers.note) if joined.first else Profiler(),
    )
    it.history = history_file.read(folder)
    if found:
        try:
            _refuse_other_data(found, corpus)
            made.restore(found.tensors, found.state)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{found.path} holds no run's state: {type(error).__name__} {error}") from error
        seconds = time.perf_counter() - begin
        checkpointer.notes.append(f"went on from step {found.step}, verified and loaded in {seconds:.2f} s")
    elif run.start_from is not None:
        came = starts.load(run, it, corpus.tokenizer, folder.parent)
        checkpointer.notes.append(f"began with the weights of {came}")
    it.fitting.advice = run.memory.advice()
    how = {"device": hardware.name(joined.device), "memory": str(run.memory), "compile": run.compile}
    how |= {"attention": run.speed.attention}
    fitting.settle(it, folder, run.memory.microbatch, how, lambda text: trackers.note(text))
    if mirror is not None and (newest := store.whole(checkpointer.folder)):
        mirror.submit(newest[-1][0])  # the process before this one may have been killed before it was sent
    trackers.start(header(run, made, corpus, mirror), it.step, steps=made.stop_at, config=run.yaml())
    if run.task.takes == "pairs" and it.step == 0 and (floor := floors.said(it, corpus, run.evaluation.batches)):
        trackers.note(floor)
    made.saves.pass_on()
    try:
        yield made
    except BaseException:
        checkpointer.wait(OTHERS_WAIT_S if joined.size > 1 else None)
        raise
    finally:
        made.profiler.close()
        checkpointer.wait()
        if mirror is not None:
            mirror.close(run.guard.deadline_s or MIRROR_WAIT_S)
        trackers.close(made.status)
        notifier.tell(f"{made.status} at step {it.step} of {run.steps}")
        notifier.close()
        it.loader.close()


def first_state(run: Run, it: Learner, corpus: Any) -> dict[str, Any]:
    """What a checkpoint of a learner that no trainer has seen says beside its tensors."""
    return {"learner": it.state(), "best": run.evaluation.best().state_dict(), "seconds": 0.0, **_facts(corpus)}


def _opened(run: Run, joined: Ranks, report: Report | None) -> Any:
    """The corpus. What has to be prepared is prepared by the first rank, while the others wait."""
    joined.host.first_does(lambda: run.data.open(report) and None)
    return run.data.open()


def _compile(model: Any, how: str, mode: str | None) -> None:
    if how == "blocks":
        for block in model.backbone.blocks:
            block.compile(mode=mode)
    elif how == "full":
        model.compile(mode=mode)


def _refuse_small_vocabulary(vocab: int, run: Run) -> None:
    vocab += run.task.own_ids
    if vocab > run.model.vocab:
        raise UserError(
            f"the tokenizer has {vocab} ids and model.vocab={run.model.vocab} has no room for them: "
            f"use model.vocab={-(-vocab // 64) * 64} or a smaller tokenizer"
        )


def _facts(corpus: Any) -> dict[str, Any]:
    return {"data": {"fingerprint": corpus.fingerprint, "name": corpus.name, "tokenizer": corpus.tokenizer.identity}}


def _refuse_other_data(found: Loaded, corpus: Any) -> None:
    before = found.state["data"]
    if before["tokenizer"] != corpus.tokenizer.identity:
        raise UserError(
            f"{found.path} was trained with the tokenizer {before['tokenizer']['name']} and this data has "
            f"{corpus.tokenizer.name}: give it its own data, or train under another name"
        )
    if before["fingerprint"] != corpus.fingerprint:
        raise UserError(
            f"{found.path} was trained on another text than {corpus.name} is now: bring back what it was trained on, "
            f"or train under another name"
        )


def _sampler(run: Run, it: Learner, corpus: Any) -> Callable[[], str]:
    def sample() -> str:
        written = stream(
            it.model,
            corpus.tokenizer,
            run.evaluation.prompt,
            tokens=run.evaluation.sample_tokens,
            context=run.model.context,
            seed=run.seed,
        )
        return run.evaluation.prompt + "".join(written)

    return sample
