"""torchrun's agent (torch.distributed.elastic) inside this process: it starts the ranks, looks after them, and starts all of
them again when one was lost. What it says to a person is a line of our own, and the ranks' exit codes are this process's.

The ranks have no terminal of their own, so a signal to this process is passed on to them: they save, and leave with 75.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainkit import hardware, logs
from trainkit.errors import DAMAGED, DIVERGED, DONE, FAILED, MISTAKE, STOPPED, UserError
from trainkit.run import Run
from trainkit.torchrun import Launch

FINAL = (MISTAKE, DIVERGED, DAMAGED, STOPPED)  # after which another start would only meet the same, or is not wanted
LEFT_AT_ONCE = 130
LOOK_S = 0.1
PROGRAM = (sys.executable, "-u", "-m", "trainkit")
JOIN_S = 600.0  # for the machine that keeps the rendezvous
MEET_S = 5.0  # in which ranks have been started, if no other machine is waited for


def start(launch: Launch, run: Run, folder: Path, command: Sequence[str]) -> int:
    """Start `trainkit COMMAND` on every rank; the exit code says how they ended.

    Raises:
        UserError: there are not as many GPUs, or the ranks cannot share the run.
    """
    nproc = _ranks_here(launch, run)
    if launch.nodes[0] == launch.nodes[1] and run.parallel.kind != "auto":
        run.parallel.sizes(nproc * launch.nodes[1])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // nproc)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
        rdzv_handler=_meeting(parameters),
        max_restarts=launch.restarts,
        monitor_interval=LOOK_S,
        local_addr=parameters.local_addr,
    )
    with _silent(), tempfile.TemporaryDirectory(prefix="trainkit-") as place:
        return Agent(spec, DefaultLogsSpecs(log_dir=place), folder, elastic=launch.nodes[0] < launch.nodes[1]).end()


class Agent(LocalElasticAgent):
    """It starts nothing again that a person stopped, or that another start would only meet again. Of machines that come and
    go (`elastic`) those that stay go on when another one is asked to stop."""

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, folder: Path, *, elastic: bool) -> None:
        super().__init__(spec, logs_specs=logs_specs)
        self._folder = folder
        self._final = set(FINAL) - ({STOPPED} if elastic else set())
        self._asked: list[float] = []  # when, by time.monotonic, a person asked to stop
        self._at_once = False
        self._told: set[int] = set()  # processes that were told so
        self._begun = time.time()
        self._codes: list[int] = []  # of the ranks that ended by themselves, when one had failed
        self._result: RunResult | None = None
        self._error: BaseException | None = None

    def end(self) -> int:
        """Run the ranks until they have ended; how they did."""
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
        if isinstance(self._error, RendezvousError):
            raise ConnectionError(f"the other machines are gone: {self._error}") from self._error
        if self._error is not None:
            raise self._error
        return self._code()

    def _work(self) -> None:
        try:
            self._result = self.run()
            if not (self._asked and STOPPED not in self._final):  # else others go on, and may be joined again
                self._worker_group.spec.rdzv_handler.shutdown()
        except BaseException as error:
            self._error = error

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        by_themselves = {worker.global_rank for worker in worker_group.workers if _has_ended(worker.id)}
        result = super()._monitor_workers(worker_group)  # which ends the others when one has failed
        if result.is_failed():
            codes = {rank: failure.exitcode for rank, failure in sorted(result.failures.items())}
            codes = {rank: code for rank, code in codes.items() if rank in by_themselves} or codes
            self._codes = list(codes.values())
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
        if self._result is None or not self._result.is_failed():
            return DONE
        if self._asked and set(self._codes) <= {STOPPED, -signal.SIGTERM}:  # or had not come as far as a handler
            return STOPPED
        return next((code for code in self._codes if code in FINAL), FAILED)

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


def _has_ended(pid: Any) -> bool:
    """Whether a child of this process has; what is left of it stays for torchrun."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _meeting(parameters: RendezvousParameters) -> Any:
    """Where machines meet. The one whose address it is keeps it; the others wait for that one to come."""
    host, _, port = parameters.endpoint.rpartition(":")
    keeps, end = _is_free_here(host, int(port)), time.monotonic() + JOIN_S
    while True:
        parameters.config["is_host"] = (
            keeps  # torch would look at this machine's name, which need not lead to its address
        )
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError as error:
            if not keeps and time.monotonic() > end:
                raise ConnectionError(
                    f"nobody answers at rendezvous={parameters.endpoint}: it has to be the address of one of these machines, "
                    f"and its port open"
                ) from error
            keeps = False  # another process of this machine was faster
            time.sleep(LOOK_S)


def _is_free_here(host: str, port: int) -> bool:
    """Whether that is an address of this machine, and nobody has the port yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as it:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            it.bind(address)
    except OSError:
        return False
    return True


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
