"""What a person wants to see before a run starts."""

import math
from typing import Any

from trainkit import hardware
from trainkit.checkpoint.mirror import Mirror
from trainkit.learner import Learner
from trainkit.run import Run
from trainkit.trainer import Trainer
from trainkit.units import human_bytes, human_count


def header(run: Run, trainer: Trainer, corpus: Any, mirror: Mirror | None) -> dict[str, str]:
    """What a person wants to see before a run starts."""
    it, meter = trainer.learner, trainer.meter
    device, ways = it.ranks.device, it.ranks.readers
    micro = it.fitting.rows
    accumulated = -(-run.data.batch // ways // micro)
    peak = f"{meter.peak_flops / 1e12:.2f} TFLOP/s measured in {run.precision.compute or run.precision.params}"
    return {
        "run": f"{run.name}, step {it.step} to {trainer.stop_at}"
        if it.step
        else f"{run.name}, {trainer.stop_at} steps",
        "model": f"{human_count(run.model.parameters())} parameters{_trained(run, it)}",
        "data": f"{corpus.name}: {human_count(corpus.train_tokens)} tokens to learn from, "
        f"{human_count(corpus.validation_tokens)} held out, tokenizer {corpus.tokenizer.name}",
        "device": f"{hardware.name(device)}, {peak}",
        **({"mesh": f"{it.ranks.sizes}: {it.ranks.size} ranks"} if it.ranks.size > 1 else {}),
        "batch": f"{micro} rows × {accumulated} accumulated × {ways} {_of(it, ways)} = {run.data.batch} "
        f"rows of {run.data.length}: {human_count(meter.tokens_per_step)} tokens a step, "
        f"{run.data.batch * run.steps / _samples(it):.1f} epochs",
        **run.speed.describe(device),
        **({"mirror": mirror.describe()} if mirror else {}),
        "memory": f"{run.memory.describe()}; a checkpoint takes {human_bytes(checkpoint_bytes(it))}",
    }


def checkpoint_bytes(it: Learner) -> int:
    """How much a checkpoint takes: two moments beside every parameter at most, and of bfloat16 the weights in float32."""
    if (layout := getattr(it.model, "layout", None)) is not None:  # no adapter: all of it learns
        width = it.parameters[0].itemsize
        return sum(math.prod(shape) for shape in layout.shapes.values()) * (14 if width == 2 else 3 * width)
    learns = sum(p.numel() * 12 if p.itemsize == 2 else 2 * p.nbytes for p in it.parameters)
    return learns + sum(p.nbytes for p in it.model.parameters())


def _of(it: Learner, ways: int) -> str:
    return f"{'replica' if it.ranks.mixed else 'rank'}{'s' if ways > 1 else ''}"


def _trained(run: Run, it: Learner) -> str:
    """How much of it learns, if not all."""
    adapter = run.model.adapter
    count = human_count(sum(p.numel() for p in it.parameters))
    return "" if adapter is None else f", frozen; {adapter.kind} learns {count}"


def _samples(it: Learner) -> float:
    return it.loader.batch / max(it.loader.epoch(1), 1e-12)
