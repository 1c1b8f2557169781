"""Runs of which a rank, or a whole machine, is killed at a random step: how fast the others end, and what is learned."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.rank_server import Server, kill_all
from tests.ranks import free_port
from tests.short_runs import SMALL, difference, end_of, write_corpus
from trainkit import logs

STEPS = 40
WHAT = [*SMALL, f"steps={STEPS}", "checkpoint.every=5", "checkpoint.keep_best=0"]
MOST_S = 60.0  # within which the others have to be gone


@dataclass
class Drills:
    """Drills in `folder`, with agents of `server`."""

    server: Server
    folder: Path
    draw: random.Random
    slowest: float = 0.0  # seconds that the others went on after a kill, at most

    def __post_init__(self) -> None:
        write_corpus(self.folder / "corpus.txt", 60, random.Random(0))

    def whole(self, name: str, nproc: int, *how: str) -> None:
        """A run that is left alone."""
        code = self.start(name, f"nproc={nproc}", *how).wait()
        assert code == 0, self.said(name)

    def kill_a_rank(self, name: str, whole: str, nproc: int, *how: str) -> str | None:
        """SIGKILL for a random rank at a random step; torchrun starts all again. What was not as promised, in words."""
        at, victim = self.draw.randrange(1, STEPS - 1), self.draw.randrange(nproc)
        run = self.start(name, f"nproc={nproc}", "restarts=1", *how)
        if not self.reaches(name, at, run):
            return f"it ended before step {at}: {self.said(name)}"
        ranks = self.ranks(name, nproc)
        os.kill(ranks[victim], signal.SIGKILL)
        if (seconds := self.gone([pid for rank, pid in ranks.items() if rank != victim])) > MOST_S:
            return f"the others went on for {seconds:.0f} s"
        if (code := run.wait()) != 0:
            return f"exit code {code}: {self.said(name)}"
        if f"rank {victim} was killed by SIGKILL; all ranks start again" not in self.said(name):
            return f"rank {victim} was not named: {self.said(name)}"
        named = self.said(name) + "".join(logs.path(self.run(name), r).read_text() for r in ranks if r)
        if f"rank {victim} does not answer any more" not in named:
            return f"no other rank named rank {victim}: {named}"
        return self.ended(name, whole)

    def kill_a_machine(self, name: str, whole: str, *how: str) -> str | None:
        """Two agents with a rank each; at a random step one of them is killed with all that is its own, and the other one
        goes on alone."""
        at, port = self.draw.randrange(1, STEPS - 1), free_port()
        words = ["nproc=1", "restarts=3", "nodes=1:2", f"rendezvous=127.0.0.1:{port}", "address=127.0.0.1"]
        stays = self.start(name, *words, *how)
        while not listens(port):  # it has to keep torchrun's store
            if stays.poll() is not None:
                return f"it ended before it began: {self.said(name)}"
            time.sleep(0.05)
        goes = self.start(name, *words, *how, said=f"{name}-other")
        if not self.reaches(name, at, stays):
            return f"it ended before step {at}: {self.said(name)}"
        if not logs.path(self.run(name), 1).exists():
            return "the two did not meet"
        begin = time.monotonic()
        kill_all(self.folder / f"{name}-other.txt")
        goes.wait()
        if (code := stays.wait()) != 0:
            return f"exit code {code}: {self.said(name)}"
        self.slowest = max(self.slowest, time.monotonic() - begin)
        return self.ended(name, whole, but=("random.",))  # each rank's generators, which no step reads

    def start(self, name: str, *words: str, said: str | None = None) -> "subprocess.Popen[bytes]":
        return self.server.start(["train", *WHAT, *words, f"name={name}"], self.folder / f"{said or name}.txt")

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def reaches(self, name: str, step: int, process: "subprocess.Popen[bytes]") -> bool:
        """Wait until the run has logged `step`; False when it ended before."""
        log = self.run(name) / "metrics.jsonl"
        while process.poll() is None:
            lines = log.read_text().splitlines() if log.exists() else []
            if len(lines) >= step:
                return True
            time.sleep(0.01)
        return False

    def ranks(self, name: str, nproc: int) -> dict[int, int]:
        """The processes by rank."""
        first = json.loads((self.run(name) / "LOCK").read_text())["pid"]
        texts = {rank: logs.path(self.run(name), rank).read_text() for rank in range(1, nproc)}
        return {0: first} | {rank: int(text.split(", process ")[-1].split()[0]) for rank, text in texts.items()}

    def gone(self, pids: list[int]) -> float:
        """Seconds until none of these processes is there."""
        begin = time.monotonic()
        while any(alive(pid) for pid in pids) and time.monotonic() - begin < 2 * MOST_S:
            time.sleep(0.02)
        seconds = time.monotonic() - begin
        self.slowest = max(self.slowest, seconds)
        return seconds

    def ended(self, name: str, whole: str, but: tuple[str, ...] = ()) -> str | None:
        """What is not the same as in the run that was left alone; `but` begins the names of tensors that need not be."""
        tensors, losses = end_of(self.folder, whole)
        kept = {key: bits for key, bits in tensors.items() if not (but and key.startswith(but))}
        found = difference(end_of(self.folder, name), (kept, losses))
        if found is None:
            shutil.rmtree(self.run(name))
        return found


def listens(port: int) -> bool:
    """Whether somebody on this machine does, without a word to them."""
    lines = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    listening = [line.split()[1] for line in lines if " 0A " in line]
    return any(int(place.rpartition(":")[2], 16) == port for place in listening)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
