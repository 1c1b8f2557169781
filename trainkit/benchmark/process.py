"""A cell in a process of its own: started, waited for, ended with this one, and its end put into words."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CELL = "trainkit.benchmark.cell"
KILLED = "killed by SIGKILL, which is how the kernel takes a process when memory runs out"
WORST_FIRST = ("oom", "failed", "refused", "ok")


def run(spec: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """What a fresh process (or `ranks` of them under torchrun) measured for `spec`, as `cell.measure` says it, and how
    it ended: `status` is ok, oom, failed or refused, and `error` says why in one line.

    Whatever ends this process ends that one as well: it waits for the end of its standard input.
    """
    with tempfile.TemporaryDirectory(prefix="trainkit-benchmark-") as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(spec))
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        threads = {"OMP_NUM_THREADS": str(spec["threads"])} if spec.get("threads") else {}
        with (folder / "log").open("wb") as log:
            child = subprocess.Popen(
                [*start, CELL, name],
                env={**os.environ, **threads},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is this process's business
            )
            try:
                code = child.wait()
            finally:
                _end(child)
        found = [json.loads(file.read_bytes()) for file in sorted(folder.glob("rank-*.json"))]
        return _together(found, ranks, code, (folder / "log").read_text(errors="replace"))


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End what is still there: the ranks by the end of their input, torchrun, or the cell and its helpers, by its group."""
    assert child.stdin is not None
    child.stdin.close()
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _together(found: list[dict[str, Any]], ranks: int, code: int, log: str) -> dict[str, Any]:
    """The ranks' outcomes as one: the worst status, the first rank's times, the memory of the rank that took most."""
    if len(found) < ranks:
        found = [*found, _without_words(code, log)]
    worst = min(found, key=lambda outcome: WORST_FIRST.index(outcome["status"]))
    if worst["status"] != "ok":
        return worst | {"log": log.splitlines()[-30:]}
    largest = max(found, key=lambda outcome: outcome.get("memory", {}).get("peak") or 0)
    grown = max(outcome["peak_rss_growth_bytes"] for outcome in found)
    memory = {"memory": largest["memory"]} if "memory" in largest else {}
    memory |= {"talk": found[-1]["talk"]} if "talk" in found[-1] else {}  # the last rank's, which shares all axes
    return found[0] | memory | {"peak_rss_growth_bytes": grown, "ranks": ranks}


def _without_words(code: int, log: str) -> dict[str, Any]:
    """The outcome of a process that could not say how it ended."""
    killed = signal.SIGKILL
    if code in (-killed, 128 + killed) or f"Signal {killed:d} ({killed.name})" in log:  # torchrun's words
        return {"status": "oom", "error": KILLED}
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    said = [line.strip() for line in log.splitlines() if line.strip()]
    return {"status": "failed", "error": f"the process {how}" + (f": {said[-1]}" if said else "")}
