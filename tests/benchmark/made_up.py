"""Documents of rounds that nobody measured, for what shows them."""

from typing import Any

from trainkit.benchmark.document import document
from trainkit.benchmark.rounds import Measured, Settings
from trainkit.benchmark.sweep import Cell, Experiment
from trainkit.run import Run, composed

MIB = 1 << 20
RUN: Run = composed(["model=tiny"])
HOSTILE = "<script>alert('x')</script>&"


def found(seconds: float = 2.0, peak: int | None = 100 * MIB, loss: float = 5.0, **more: Any) -> dict[str, Any]:
    """One round: 4 steps of 1000 tokens at 6 FLOPs each, on a device that does 12,000 a second."""
    memory = {
        "memory": {
            "peak": peak,
            "by_category": {"parameters": 10 * MIB, "optimizer": 0, "activations": (peak or 0) - 10 * MIB},
            "by_phase": {"forward": {"peak": peak, "by_category": {}}},
        },
        "loss": loss,
    }
    return {
        "status": "ok",
        "seconds": seconds,
        "steps": 4,
        "tokens_per_step": 1000,
        "flops_per_token": 6.0,
        "peak_flops": 12_000.0,
        "parameters": 7,
        "losses": [6.0, loss],
        "peak_rss_growth_bytes": 123 * MIB,
        "device": "an abacus",
        "data": "f00d",
        "ranks": 1,
        **(memory if peak is not None else {}),
        **more,
    }


def cells(*rounds: list[dict[str, Any]], title: str = "", names: list[str] | None = None) -> list[Measured]:
    """Cells of one experiment, by what their rounds found; no round: refused."""
    words = names or [f"memory={i}" for i in range(len(rounds))]
    made = [
        Cell(overrides=(word,), swept=(word,), run=RUN if r else None, refusal=None if r else "cannot be")
        for word, r in zip(words, rounds)
    ]
    experiment = Experiment(title, tuple(made))
    return [Measured(experiment, cell, list(r)) for cell, r in zip(made, rounds)]


def made_up(*rounds: list[dict[str, Any]], **how: Any) -> dict[str, Any]:
    """A document of one experiment."""
    settings = Settings(rounds=max(len(r) for r in rounds), steps=4, warmup=1)
    return document(cells(*rounds, **how), settings, command="trainkit benchmark")


def usual() -> dict[str, Any]:
    """Two good cells, one out of memory, one refused, one with a hostile name; two rounds."""
    no_room = {"status": "oom", "error": f"no room for {HOSTILE}"}
    good, other = [found(2.0), found(2.2, None)], [found(2.6, 40 * MIB), found(2.7, None)]
    names = ["memory=baseline", "memory=checkpoint", "model=gpt2", "memory=never", f"data.path={HOSTILE}"]
    return made_up(good, other, [no_room], [], good, names=names, title="an experiment")
