"""One cell, in this process: `python -m trainkit.benchmark.cell FOLDER` reads FOLDER/spec.json and writes rank-N.json.

The order is: the device's matrix rate, warm-up steps, timed steps, and then, in rounds that ask for it, one more step whose
memory is followed allocation by allocation, which would slow the others.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from trainkit import build, hardware
from trainkit import run as runs
from trainkit.benchmark import talk
from trainkit.benchmark.resident import PeakResident
from trainkit.errors import FAILED, RanOutError, UserError
from trainkit.learner import Learner
from trainkit.memory.room import ran_out
from trainkit.profile.allocations import Allocations


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """What `spec` (overrides, config_dir, warmup, steps, memory) costs, and what it learns.

    Returns:
        `seconds` of the timed steps, `tokens_per_step` over all ranks, `flops_per_token`, `peak_flops` of one rank;
        `losses` (nats a token) of all steps; `peak_rss_growth_bytes` from before the model was made; on CUDA the
        allocator's own peaks; where asked `memory`: `peak` bytes, `by_category`, `by_phase`, and the `loss` after
        warmup + steps updates, which is that of the step then measured; of several ranks `talk`, as `talk.measured` has it.
    """
    run = runs.composed(spec["overrides"], Path(spec["config_dir"]) if spec["config_dir"] else None)
    ranks = build.ranks(run)
    peak_flops = hardware.peak_flops(ranks.device, run.precision.matmul_dtype())
    corpus = run.data.open()
    resident = PeakResident()
    it = build.learner(run, corpus, ranks)
    rows = it.fitting.rows
    try:
        losses = [it.train_step()["loss"] for _ in range(spec["warmup"])]
        _start_of_timing(ranks.device)
        begin = time.perf_counter()
        losses += [it.train_step()["loss"] for _ in range(spec["steps"])]
        _wait(ranks.device)
        seconds = time.perf_counter() - begin
        if it.fitting.rows != rows:
            raise RanOutError(f"{rows} rows at once are too many, {it.fitting.rows} are not")
        found = {
            "seconds": seconds,
            "steps": spec["steps"],
            "tokens_per_step": it.loader.tokens_per_step,
            "flops_per_token": run.model.flops_per_token(run.data.length, head=run.task.head),
            "peak_flops": peak_flops,
            "parameters": run.model.parameters(),
            "losses": [float(loss) for loss in losses],
            "peak_rss_growth_bytes": resident.growth(),
            "device": hardware.name(ranks.device),
            "data": corpus.fingerprint,
            **_cuda_peaks(ranks.device),
        }
        if spec["memory"]:
            found |= _memory(it)
            found |= {"talk": talk.measured(it)} if ranks.size > 1 else {}
    finally:
        it.loader.close()
    ranks.leave()
    return found


def _memory(it: Learner) -> dict[str, Any]:
    with Allocations(it.model, it.optimizer) as seen:
        loss = float(it.train_step()["loss"])
    phases = {name: {"peak": phase.peak, "by_category": phase.at_peak} for name, phase in seen.by_phase.items()}
    return {"memory": {"peak": seen.peak, "by_category": seen.at_peak, "by_phase": phases}, "loss": loss}


def ended(error: Exception) -> dict[str, Any]:
    """How a cell ended that raised: running out of memory and being refused are results."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return {"status": "refused", "error": text}
    if isinstance(error, RanOutError) or ran_out(error):
        return {"status": "oom", "error": text}
    return {"status": "failed", "error": f"{type(error).__name__}: {text}"}


def _start_of_timing(device: torch.device) -> None:
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cuda_peaks(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {
        "cuda_peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "cuda_peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _end_with_whoever_started_this() -> None:
    """Leave when standard input ends: when the one that started this closed it, or is no more."""

    def wait() -> None:
        while os.read(0, 4096):
            continue
        os._exit(FAILED)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _first_to_go() -> None:
    """When the machine runs out of memory, Linux shall take this process and not the one that reports it."""
    with contextlib.suppress(OSError):  # no Linux, or a container that forbids it
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(folder: Path) -> None:
    """Measure, and write down how it ended."""
    _end_with_whoever_started_this()
    _first_to_go()
    try:
        found = {"status": "ok", **measure(json.loads((folder / "spec.json").read_bytes()))}
    except Exception as error:
        traceback.print_exc()
        found = ended(error)
    there = folder / f"rank-{int(os.environ.get('RANK', '0')):04}.json"
    there.with_suffix(".new").write_text(json.dumps(found))
    there.with_suffix(".new").rename(there)
    if found["status"] != "ok":
        sys.exit(FAILED)  # torchrun ends the others


if __name__ == "__main__":
    main(Path(sys.argv[1]))
