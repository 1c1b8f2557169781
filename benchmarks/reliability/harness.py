"""Drives one system's server through every fault and every flip, and says what each one left."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.reliability import SYSTEMS, compiler

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "checkpoint" / "faults" / "shim.c"
FAULTS = {"kill": ("kill", 0), "torn": ("torn", 0), "full": ("28", 1)}


class NotHere(RuntimeError):
    """This machine lacks what a system needs."""


def build_shim(folder: Path) -> Path:
    library = folder / "shim.so"
    subprocess.run([str(compiler()), "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return library


def other_filesystem(folder: Path) -> Path:
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir()), Path.home()):
        if place.is_dir() and os.access(place, os.W_OK) and place.stat().st_dev != folder.stat().st_dev:
            return place
    raise NotHere("no second filesystem to put TMPDIR on")


class Trials:
    """The trials of one system, each in a folder of its own."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path, temporary: str) -> None:
        self._server, self._folder, self._log = server, folder, folder / "log"
        self._run, self._temporary = folder / "run", temporary

    def anywhere(self, text: str) -> str:
        """Without the names of this machine's folders."""
        return text.replace(self._temporary, "TMPDIR").replace(str(self._run), "run")

    def _job(self, **job: Any) -> dict[str, Any]:
        answer = self._folder / "answer.json"
        answer.unlink(missing_ok=True)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({**job, "answer": str(answer)}) + "\n")
        self._server.stdin.flush()
        reply = self._server.stdout.readline()
        if not reply:
            raise RuntimeError(f"the server died:\n{self._log.read_text()[-2000:]}")
        outcome: dict[str, Any] = json.loads(reply)
        return outcome | (json.loads(answer.read_text()) if answer.exists() else {})

    @contextmanager
    def saved(
        self, fault: str = "none", at: int = 0, sticky: int = 0, **more: Any
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A new folder after its three saves, the last of them with a fault, and what was told of them."""
        folder = self._run
        folder.mkdir()
        log = self._folder / "calls"
        log.unlink(missing_ok=True)
        what = {"folder": str(folder), "fault": fault, "at": at, "sticky": sticky, "log": str(log)}
        told = self._job(save=what, **more)
        told["named"] = self.anywhere(log.read_text()).splitlines() if log.exists() else []
        yield folder, told
        shutil.rmtree(folder)

    def resume(self, folder: Path, path: str | None = None) -> dict[str, Any]:
        return self._job(resume={"folder": str(folder), "path": path})

    def undisturbed(self) -> dict[str, Any]:
        """What a save without a fault does, once everything it needs has been imported."""
        with self.saved() as (_, first):
            pass
        if "failed" in first:
            raise RuntimeError(f"a save without a fault failed: {first['failed']}\n{self._log.read_text()[-2000:]}")
        with self.saved(**{"import": first["imported"]}) as (folder, told):
            found = self.resume(folder)
            if step_of(found.get("state"), told["states"]) != told["acknowledged"]:
                raise RuntimeError(f"a resume without a fault failed: {found}\n{self._log.read_text()[-2000:]}")
        return told


@contextmanager
def trials(system: str, shim: Path) -> Iterator[Trials]:
    listed = SYSTEMS[system]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = other_filesystem(folder) if listed.elsewhere else folder
        with tempfile.TemporaryDirectory(dir=place) as temporary, open(folder / "log", "w") as log:
            quiet = {"PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
            server = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.reliability.server", system],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **quiet, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "TMPDIR": temporary},
            )
            try:
                yield Trials(server, folder, temporary)
            finally:
                assert server.stdin is not None
                assert server.stdout is not None
                server.stdin.close()
                server.wait()
                server.stdout.close()


def step_of(state: dict[str, str] | None, states: dict[str, dict[str, str]]) -> int | None:
    """The step whose state this is, as a whole; None where there is none."""
    return max((int(step) for step, prints in states.items() if prints == state), default=None)


def pieces(state: dict[str, str], states: dict[str, dict[str, str]]) -> str:
    """How many pieces of a mixed state are of which step; one may be the same in several."""
    newest = sorted(states, key=int, reverse=True)
    steps = Counter(next((s for s in newest if states[s].get(name) == it), "no") for name, it in state.items())
    missing = len(states[newest[0]].keys() - state.keys())
    return ", ".join(f"{n} of step {s}" for s, n in sorted(steps.items())) + (f", {missing} missing" if missing else "")


def verdict(them: Trials, folder: Path, told: dict[str, Any]) -> tuple[str, str]:
    """What the system's own resume makes of it, and in which words."""
    found = them.resume(folder)
    if "state" in found:
        if found["state"] is None:
            return "LOST", "it would start from zero"
        step = step_of(found["state"], told["states"])
        if step is None:
            return "MIXED", pieces(found["state"], told["states"])
        return "OK" if step >= told["acknowledged"] else "LOST", f"step {step}"
    why = them.anywhere(found.get("error", "the process died"))
    for path in found.get("checkpoints", []):
        by_name = them.resume(folder, path)
        if (step_of(by_name.get("state"), told["states"]) or 0) >= told["acknowledged"]:
            return "STUCK", why
    return "LOST", why


def faults(system: str, shim: Path) -> dict[str, Any]:
    """Every fault at every call of a save: its verdicts, and the calls they belong to."""
    with trials(system, shim) as them:
        calm = them.undisturbed()
        result: dict[str, Any] = {"title": SYSTEMS[system].titled, "calls": calm["named"], "faults": {}}
        for name, (fault, sticky) in FAULTS.items():
            outcomes = []
            for at in range(1, calm["calls"] + 1):
                with them.saved(fault, at, sticky) as (folder, told):
                    if len(told["named"]) < at or told["killed"] != (name != "full"):
                        raise RuntimeError(f"{system}: call {at} was not reached; its saves differ from one to another")
                    what, why = verdict(them, folder, told)
                    outcomes.append({"at": at, "verdict": what, "why": why})
            result["faults"][name] = outcomes
    return result


def flips(system: str, shim: Path, count: int) -> dict[str, Any]:
    """Single bits flipped in the newest checkpoint, at random places in all its files, each undone before the next."""
    dice = random.Random(0)
    with trials(system, shim) as them:
        first = them.undisturbed()
        with them.saved(**{"import": first["imported"]}) as (folder, told):
            newest = Path(them.resume(folder)["checkpoints"][0])
            files = sorted(p for p in newest.rglob("*") if p.is_file()) if newest.is_dir() else [newest]
            sizes = [p.stat().st_size for p in files]
            seen: Counter[str] = Counter()
            for _ in range(count):
                file = dice.choices(files, sizes)[0]
                whole = file.read_bytes()
                bit = dice.randrange(8 * len(whole))
                changed = bytearray(whole)
                changed[bit // 8] ^= 1 << bit % 8
                file.write_bytes(changed)
                found = them.resume(folder, str(newest))
                file.write_bytes(whole)
                if "state" not in found:
                    seen["detected"] += 1
                else:
                    same = step_of(found["state"], told["states"]) == told["acknowledged"]
                    seen["harmless" if same else "silently wrong"] += 1
    return {"title": SYSTEMS[system].titled, "bytes": sum(sizes), "count": count, **seen}
