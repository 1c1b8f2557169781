"""One cell of gpu.py, in a process of its own: `python benchmarks/gpu_cells.py SPEC`, a spec as JSON.

It says what it found as a line of JSON, more than once where that grows, or takes turns with another (turns.py).
"""

import contextlib
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import turns

from trainkit import build, hardware
from trainkit import run as runs
from trainkit.learner import Learner
from trainkit.plan.cards import Card, find
from trainkit.plan.planned import Setting, plan
from trainkit.profile.allocations import Allocations
from trainkit.run import Run

WARMUP = 3  # steps, compiling among them
CPU = Card("cpu", 24, 1, 1, 1, 1, 1, 1, 1, 1, cuda=False)  # of a dry run


class Device:
    """A GPU, or in a dry run the CPU."""

    def __init__(self, dry: bool) -> None:
        self.torch = hardware.choose("cpu" if dry else "cuda")
        self.cuda = self.torch.type == "cuda"
        self.card = CPU if dry else find("here")

    def cap(self, gigabytes: float | None) -> None:
        """Let this process have no more than so much of it."""
        if gigabytes is not None and self.cuda:
            torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / hardware.memory(self.torch), self.torch)

    def wait(self) -> None:
        """Until it has done all that it was told."""
        if self.cuda:
            torch.cuda.synchronize(self.torch)

    def begin(self) -> None:
        """Forget the most that was allocated."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peaks(self) -> dict[str, float]:
        """The most bytes that were allocated, and kept by the allocator, since `begin`."""
        if not self.cuda:
            return {}
        allocated, reserved = torch.cuda.max_memory_allocated(self.torch), torch.cuda.max_memory_reserved(self.torch)
        return {"peak_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}


def facts() -> dict[str, Any]:
    """What this machine is."""
    device = hardware.choose("auto")
    return {
        "name": hardware.name(device),
        "memory_gb": hardware.memory(device) / 1e9,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measured(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What steps of a run take: tokens a second, MFU of the data sheet's peak and of a matrix product's rate, memory, losses;
    beside a plan, how far that was off."""
    run, device = (
        runs.composed([*spec["words"], *(["parallel.device=cpu"] if spec["dry"] else [])]),
        Device(spec["dry"]),
    )
    found: dict[str, Any] = {}
    if spec.get("plan"):
        found["planned_gb"] = plan(run, Setting(device.card, documents=False)).peaks["training"] / 1e9
    device.cap(spec.get("cap_gb"))
    ranks = build.ranks(run)
    rate = hardware.peak_flops(ranks.device, run.precision.matmul_dtype())
    it = build.learner(run, run.data.open(), ranks)
    flops = run.model.flops_per_token(run.data.length)
    losses, seconds = [], []
    device.begin()
    for number in range(WARMUP + spec["steps"]):
        begin = time.perf_counter()
        losses.append(float(it.train_step()["loss"]))
        device.wait()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - begin)
            yield found | _speed(it, statistics.median(seconds), flops, rate, device, losses) | device.peaks()
    found |= device.peaks()
    if not device.cuda:  # to follow each allocation takes time
        with Allocations(it.model, it.optimizer) as seen:
            it.train_step()
        found["peak_gb"] = seen.peak / 1e9
    if "planned_gb" in found:
        found["plan_off"] = found["planned_gb"] / found["peak_gb"] - 1
    yield found | _speed(it, statistics.median(seconds), flops, rate, device, losses) | {"status": "ok"}


def _speed(
    it: Learner, seconds: float, flops: float, rate: float, device: Device, losses: list[float]
) -> dict[str, Any]:
    tokens_per_s = it.loader.tokens_per_step / seconds
    return {
        "ms_per_step": 1000 * seconds,
        "tokens_per_s": tokens_per_s,
        "mfu": tokens_per_s * flops / (device.card.bf16 * 1e12),
        "of_matmul_rate": tokens_per_s * flops / rate,
        "steps": len(losses),
        "loss": losses[-1],
        "losses": losses,
    }


def system(spec: dict[str, Any]) -> None:
    """trainkit, or nanoGPT at the same sizes, a turn of about `turn_s` whenever it is asked."""
    run, device = (
        runs.composed([*spec["words"], *(["parallel.device=cpu"] if spec["dry"] else [])]),
        Device(spec["dry"]),
    )
    ranks = build.ranks(run)
    if spec["system"] == "trainkit":
        it = build.learner(run, run.data.open(), ranks)

        def step() -> None:
            it.train_step()
    else:
        step = _nanogpt(run, device, Path(spec["nanogpt"]))
    rate, flops = 0.0, run.model.flops_per_token(run.data.length)

    def turn() -> dict[str, Any]:
        nonlocal rate
        count, begin = 0, time.perf_counter()
        while count < WARMUP or time.perf_counter() - begin < spec["turn_s"]:
            step()
            count += 1
            device.wait()
        seconds = (time.perf_counter() - begin) / count
        rate = rate or hardware.peak_flops(device.torch, torch.bfloat16)
        tokens = run.data.batch * run.data.length
        return {
            "seconds_per_step": seconds,
            "tokens_per_step": tokens,
            "flops_per_step": flops * tokens,
            "matmul_rate": rate,
            "data_sheet": device.card.bf16 * 1e12,
        }

    turns.serve(turn)


def compared(seconds: dict[str, list[float]], facts: dict[str, Any]) -> dict[str, Any]:
    """Medians of both, and the median of what they differ by within a round."""
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    ours, theirs = seconds["trainkit"], seconds["nanoGPT"]
    row: dict[str, Any] = {}
    for name, s in middle.items():
        row[f"{name}_tokens_per_s"] = facts["tokens_per_step"] / s
        row[f"{name}_mfu"] = facts["flops_per_step"] / s / facts["data_sheet"]
        row[f"{name}_of_matmul_rate"] = facts["flops_per_step"] / s / facts["matmul_rate"]
    return row | {
        "times_nanogpt": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "rounds": seconds,
    }


def _nanogpt(run: Run, device: Device, folder: Path) -> Callable[[], None]:
    """A step of nanoGPT's own model and optimizer as its train.py makes it: compiled, under autocast, fused where it can be."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape: Any = run.model
    cfg = module.GPTConfig(shape.context, shape.vocab, shape.depth, shape.attention.heads, shape.width, 0.0, True)
    with contextlib.redirect_stdout(sys.stderr):
        model = module.GPT(cfg).to(device.torch)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.torch.type)
    called = torch.compile(model)
    batches = [torch.randint(shape.vocab, (run.data.batch, run.data.length + 1)) for _ in range(8)]
    rows = [batch.pin_memory() if device.cuda else batch for batch in batches]
    number = 0

    def step() -> None:
        nonlocal number
        batch = rows[number % len(rows)].to(device.torch, non_blocking=True)
        number += 1
        with torch.autocast(device.torch.type, dtype=torch.bfloat16):
            _, loss = called(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec.get("device"):
        print(json.dumps(facts()))
    elif "system" in spec:
        system(spec)
    else:
        for found in measured(spec):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
