"""torchrun's agent (torch.distributed.elastic) inside this process: it starts the ranks, looks after them, and starts all of
them again when one was lost. What it says to a person is a line of our own, and the ranks' exit codes are this process's.

The ranks have no terminal of their own, so a signal to this process is passed on to them: they save, and leave with 75.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousParameters

from trainkit import hardware, logs, rendezvous
from trainkit.errors import AGAIN, DAMAGED, DIVERGED, DONE, FAILED, MISTAKE, STOPPED, LostError, UserError
from trainkit.run import Run
from trainkit.torchrun import Launch

FINAL = (MISTAKE, DIVERGED, DAMAGED, STOPPED)  # after which another start would only meet the same, or is not wanted
LEFT_AT_ONCE = 130
LOOK_S = 0.1
PROGRAM = (sys.executable, "-u", "-m", "trainkit")
MEET_S = 5.0  # in which ranks have been started, if no other machine is waited for
DEAF_S = 15.0  # in which a store that is there has answered; torch waits for one that is not for two minutes
LEAVE_S = 5.0  # in which ranks have ended by themselves that ended elsewhere, with the machine that kept the store


def start(launch: Launch, run: Run, folder: Path, command: Sequence[str]) -> int:
    """Start `trainkit COMMAND` on every rank; the exit code says how they ended.

    Raises:
        UserError: there are not as many GPUs, or the ranks cannot share the run.
    """
    nproc = _ranks_here(launch, run)
    if launch.nodes[0] == launch.nodes[1] and run.parallel.kind != "auto":
        run.parallel.sizes(nproc * launch.nodes[1])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    return ended(launch, nproc, run.name, folder, (*PROGRAM, *command))


def ended(launch: Launch, nproc: int, name: str, folder: Path, command: Sequence[str]) -> int:
    """Run `command` as `nproc` ranks of this machine until they have ended; the exit code that says how. On several machines
    those that have the same `name` meet."""
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=launch.rendezvous or "localhost:0",
        run_id=name if launch.rendezvous else str(uuid.uuid4()),
        min_nodes=launch.nodes[0],
        max_nodes=launch.nodes[1],
        local_addr=launch.address or (None if launch.rendezvous else "localhost"),
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=nproc,
        entrypoint=command[0],
        args=tuple(word.replace("$", "$$") for word in command[1:]),  # torchrun takes them for templates
        rdzv_handler=rendezvous.meeting(parameters),
        max_restarts=launch.restarts,
        monitor_interval=LOOK_S,
        local_addr=parameters.local_addr,
    )
    where = f"rendezvous={launch.rendezvous}" if launch.rendezvous else "torchrun's store"
    with _silent(), tempfile.TemporaryDirectory(prefix="trainkit-") as place:
        agent = Agent(spec, DefaultLogsSpecs(log_dir=place), folder, where, elastic=launch.nodes[0] < launch.nodes[1])
        return agent.end()


class Agent(LocalElasticAgent):
    """It starts nothing again that a person stopped, or that another start would only meet again. Of machines that come and
    go (`elastic`) those that stay go on when another one is asked to stop. torchrun's own thread waits for minutes for its
    store, `where` that is, once a wire is cut; this one looks after it."""

    def __init__(
        self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, folder: Path, where: str, *, elastic: bool
    ) -> None:
        super().__init__(spec, logs_specs=logs_specs)
        self._folder, self._where = folder, where
        self._final = set(FINAL) - ({STOPPED} if elastic else set())
        self._asked: list[float] = []  # when, by time.monotonic, a person asked to stop
        self._at_once = False
        self._told: set[int] = set()  # processes that were told so
        self._begun = time.time()
        self._codes: dict[int, int] = {}  # of the ranks that ended by themselves, when one had failed
        self._looked: float | None = None  # when torchrun last had seen to its ranks, and turned to its store
        self._result: RunResult | None = None
        self._error: BaseException | None = None

    def end(self) -> int:
        """Run the ranks until they have ended; how they did.

        Raises:
            LostError: the other machines are gone, or the one that keeps torchrun's store.
        """
        thread = threading.Thread(target=self._work, name="agent", daemon=True)
        with _handled({signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGUSR1: self._save}):
            thread.start()
            while thread.is_alive():
                thread.join(LOOK_S)
                if self._asked and not self._tell() and time.monotonic() > self._asked[0] + MEET_S:
                    return STOPPED  # it is waiting for other machines
                if len(self._asked) > 1 and self._at_once:
                    self._send(signal.SIGKILL)
                    return LEFT_AT_ONCE
                looked = self._looked  # torchrun's thread changes it
                if looked is None or time.monotonic() < looked + DEAF_S:
                    continue
                if self._result is not None:
                    break  # it would only say good-bye
                if any((codes := self._ended()).values()):
                    self._codes, self._error = codes, RendezvousConnectionError()
                    self._send(signal.SIGKILL)  # what is left of them waits for those behind the same wire
                    break
        if isinstance(self._error, RendezvousConnectionError):
            return self._cut_off()
        if isinstance(self._error, RendezvousError):
            raise LostError(f"the other machines are gone: {self._error}") from self._error
        if self._error is not None:
            raise self._error
        return self._code()

    def _work(self) -> None:
        try:
            self._result = self.run()
            self._looked = time.monotonic()
            if not (self._asked and STOPPED not in self._final):  # else others go on, and may be joined again
                self._worker_group.spec.rdzv_handler.shutdown()
        except BaseException as error:
            self._error = error

    def _cut_off(self) -> int:
        """How the ranks ended here, when torchrun's store does not answer any more."""
        if (code := self._code()) == FAILED:
            said = _lost(self._codes, self._folder, self._begun) or [AGAIN]
            raise LostError(
                f"{self._where} does not answer any more, so its machine is gone, or the way there: {'; '.join(said)}"
            )
        return code

    def _ended(self) -> dict[int, int]:
        """The exit codes of ranks that have ended, and that torchrun has not looked at since."""
        workers = [worker for worker in self.get_worker_group().workers if isinstance(worker.id, int)]
        found = {worker.global_rank: _ended(worker.id) for worker in workers}
        return {rank: code for rank, code in sorted(found.items()) if code is not None}

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._looked = None
        super()._stop_workers(worker_group)

    def _shutdown(self, *how: Any, **more: Any) -> None:
        if isinstance(sys.exception(), RendezvousConnectionError):
            end = time.monotonic() + LEAVE_S
            while len(self._ended()) < len(self._pids()) and time.monotonic() < end:
                time.sleep(LOOK_S)
            self._codes = self._ended()
        super()._shutdown(*how, **more)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._looked = None
        by_themselves = self._ended()
        result = super()._monitor_workers(worker_group)  # which ends the others when one has failed
        if result.state == WorkerState.HEALTHY:
            self._looked = time.monotonic()
        if result.is_failed():
            codes = {rank: failure.exitcode for rank, failure in sorted(result.failures.items())}
            self._codes = codes = {rank: code for rank, code in codes.items() if rank in by_themselves} or codes
            if self._asked or self._final & set(codes.values()):
                self._remaining_restarts = 0  # as torch does where a restart is of no use
            left, most = self._remaining_restarts, worker_group.spec.max_restarts
            said = [] if self._asked else _lost(codes, self._folder, self._begun)
            if left:
                said.append(f"all ranks start again, from the newest checkpoint ({most - left + 1} of {most})")
            if said:
                print(f"trainkit: {'; '.join(said)}", file=sys.stderr, flush=True)
            self._begun = time.time()
        return result

    def _code(self) -> int:
        if self._error is None and (self._result is None or not self._result.is_failed()):
            return DONE
        codes = set(self._codes.values())
        if self._asked and codes <= {STOPPED, -signal.SIGTERM}:  # or had not come as far as a handler
            return STOPPED
        return next((code for code in self._codes.values() if code in FINAL), FAILED)

    def _stop(self, number: int, frame: Any) -> None:
        self._asked.append(time.monotonic())
        self._at_once = number == signal.SIGINT

    def _save(self, number: int, frame: Any) -> None:
        self._send(signal.SIGUSR1)

    def _tell(self) -> bool:
        """Tell the ranks that are there to stop, each once; whether there are any."""
        for pid in (pids := self._pids()):
            if pid not in self._told:
                self._told.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        return bool(pids)

    def _send(self, number: signal.Signals) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pids(self) -> list[int]:
        return [worker.id for worker in self.get_worker_group().workers if isinstance(worker.id, int)]


def _ended(pid: int) -> int | None:
    """The exit code of a child that has ended, or minus the signal that ended it; what is left of it stays for torchrun."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return DONE  # torchrun has seen to it
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _lost(codes: Mapping[int, int], folder: Path, since: float) -> list[str]:
    """Which ranks ended by themselves, and how: killed ones, else those that have last words. What the first rank has to say
    is on the terminal."""
    killed = [f"rank {rank} was killed by {signal.Signals(-code).name}" for rank, code in codes.items() if code < 0]
    failed = [
        f"rank {rank} failed: {words.removeprefix('trainkit: ')} ({logs.path(folder, rank)})"
        for rank, code in codes.items()
        if code == FAILED and rank and (words := logs.last_words(folder, rank, since))
    ]
    return killed or failed


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What torchrun has to say is said here in a line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _handled(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ranks_here(launch: Launch, run: Run) -> int:
    """How many ranks this machine has.

    Raises:
        UserError: more than it has GPUs.
    """
    device = hardware.choose(run.parallel.device)
    gpus = hardware.count(device) if device.type == "cuda" else None
    if launch.nproc is None:
        return gpus or _cores()
    if gpus is not None and launch.nproc > gpus:
        raise UserError(
            f"nproc={launch.nproc} is more than the {gpus} GPU{'s' if gpus > 1 else ''} of this machine: "
            f"use nproc={gpus}, or parallel.device=cpu"
        )
    return launch.nproc


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
