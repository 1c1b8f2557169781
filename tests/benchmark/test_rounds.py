"""Whose turn it is, and how a process's end becomes a result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import trainkit
from trainkit.benchmark import process, rounds
from trainkit.benchmark.rounds import Measured, Settings
from trainkit.benchmark.sweep import experiment

ROOT = Path(trainkit.__file__).parents[1]
OK = {"status": "ok", "peak_rss_growth_bytes": 5}


def turns(words: list[str], settings: Settings, outcomes: dict[str, list[str]]) -> tuple[list[Any], list[Measured]]:
    """The turns that were taken, (memory strategy, spec's memory, ranks); a strategy's outcomes are in order."""
    taken = []
    left = {name: list(statuses) for name, statuses in outcomes.items()}

    def run(spec: dict[str, Any], ranks: int) -> dict[str, Any]:
        name = spec["overrides"][0].partition("=")[2]
        taken.append((name, spec["memory"], ranks))
        return {"status": left[name].pop(0) if name in left else "ok"}

    cells = rounds.every([experiment(words)])
    rounds.measure(cells, settings, run=run)
    return taken, cells


def test_cells_take_turns_and_memory_is_followed_once() -> None:
    taken, cells = turns(["memory=baseline,checkpoint"], Settings(rounds=3), {})
    assert taken == [(name, number == 0, 1) for number in range(3) for name in ("baseline", "checkpoint")]
    assert [len(it.rounds) for it in cells] == [3, 3]


@pytest.mark.parametrize("status", ["oom", "failed", "refused"])
def test_what_did_not_end_well_has_no_more_turns(status: str) -> None:
    taken, cells = turns(["memory=baseline,checkpoint"], Settings(rounds=3), {"baseline": ["ok", status]})
    assert [name for name, _, _ in taken] == ["baseline", "checkpoint", "baseline", "checkpoint", "checkpoint"]
    assert [it.going_on for it in cells] == [False, True]


def test_a_refused_cell_has_none() -> None:
    taken, _ = turns(["precision=fp64,bf16", "precision.compute=bfloat16"], Settings(rounds=1), {})
    assert len(taken) == 1


def test_several_processes_are_for_those_that_train_together() -> None:
    taken, _ = turns(["parallel=single,ddp,fsdp"], Settings(rounds=1, ranks=2), {})
    assert [(name, ranks) for name, _, ranks in taken] == [("single", 1), ("ddp", 2), ("fsdp", 2)]


@pytest.fixture
def some_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CELL", "tests.benchmark.some_cell")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize(
    ("spec", "status", "said"),
    [
        ({"do": [OK]}, "ok", ""),
        ({"do": [{"status": "oom", "error": "no room"}]}, "oom", "no room"),
        ({"do": ["signal"], "signal": signal.SIGKILL}, "oom", "killed by SIGKILL"),
        ({"do": ["leave"], "code": 137}, "oom", "killed by SIGKILL"),
        ({"do": ["signal"], "signal": signal.SIGSEGV}, "failed", "the process died of SIGSEGV: the last words"),
        ({"do": ["raise"]}, "failed", "the process left with exit code 1: RuntimeError: what a shame"),
        ({"do": ["leave"], "code": 0}, "failed", "the process left with exit code 0"),
    ],
)
@pytest.mark.usefixtures("some_cell")
def test_every_end_of_a_process_is_a_result(spec: dict[str, Any], status: str, said: str) -> None:
    found = process.run(spec)
    assert found["status"] == status
    assert said in found.get("error", "")
    assert ("log" in found) == (status != "ok")


def rank(status: str, peak: int, grown: int, seconds: float) -> dict[str, Any]:
    memory = {"peak": peak, "by_category": {"parameters": peak}}
    return {"status": status, "seconds": seconds, "peak_rss_growth_bytes": grown, "memory": memory, "error": status}


@pytest.mark.usefixtures("some_cell")
def test_ranks_are_started_by_torchrun_and_taken_together() -> None:
    found = process.run({"do": [rank("ok", 10, 9, 1.0), rank("ok", 20, 7, 2.0)]}, 2)
    assert found["seconds"] == 1.0
    assert found["memory"] == {"peak": 20, "by_category": {"parameters": 20}}
    assert (found["peak_rss_growth_bytes"], found["ranks"]) == (9, 2)


@pytest.mark.usefixtures("some_cell")
def test_a_rank_that_is_killed_is_out_of_memory() -> None:
    found = process.run({"do": ["pause", "signal"], "signal": signal.SIGKILL}, 2)
    assert found["status"] == "oom"


def test_the_worst_rank_decides() -> None:
    for statuses, worst in ((["ok", "oom"], "oom"), (["failed", "oom"], "oom"), (["refused", "failed"], "failed")):
        found = process._together([rank(status, 1, 1, 1.0) for status in statuses], 2, 1, "a\nb")
        assert (found["status"], found["log"]) == (worst, ["a", "b"])


def gone(pid: int) -> bool:
    """Whether a process is no more, or only its name is."""
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts behind itself
from trainkit.benchmark import process
process.CELL = "tests.benchmark.some_cell"
try:
    process.run({"do": ["wait"], "pids": sys.argv[1]})
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    pids, scratch = tmp_path / "pids", tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    parent = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(pids)], env=environment)
    try:
        assert until(lambda: pids.exists() and pids.read_text().endswith("]"))
        cell, helper = json.loads(pids.read_text())
        assert not gone(cell)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(30) == 130
        assert until(lambda: gone(cell) and gone(helper), 10)
        assert not list(scratch.iterdir())
    finally:
        parent.kill()
        parent.wait()
