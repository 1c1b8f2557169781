"""How far precisions end from float32, and formats of weights from the weights: `python benchmarks/precision.py --out FILE`.

Every cell is the same run but for its precision: the same data in the same order, the same first weights. Three seeds.
"""

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path

import torch

from trainkit import build
from trainkit import run as runs
from trainkit.models.quantized import quantize

WAYS = {
    "fp32": ["precision=fp32"],
    "bf16": ["precision=bf16"],
    "bf16_master": ["precision=bf16_master"],
    "bf16_pure": ["precision=bf16_pure"],
    "bf16_pure, nearest": ["precision=bf16_pure", "precision.rounding=nearest"],
    "fp8 rowwise (emulated)": ["precision=fp8", "precision.float8.emulate=true"],
    "fp8 tensorwise (emulated)": [
        "precision=fp8",
        "precision.float8.emulate=true",
        "precision.float8.recipe=tensorwise",
    ],
}
ADAPTERS = {
    "all of it": [],
    "lora": ["model.adapter=lora"],
    "dora": ["model.adapter=dora"],
    "qlora": ["model.adapter=qlora"],
}
FORMATS = ["int8", "int4", "nf4"]


def learned(overrides: list[str], seed: int, start: Path | None = None) -> dict[str, float]:
    """The last validation loss of a run of `overrides`, and the bytes that it holds, by kind."""
    run = runs.composed([*overrides, f"seed={seed}", "tracking=jsonl"])
    with tempfile.TemporaryDirectory() as place:
        with build.trainer(run, Path(start or place) / run.name) as trainer:
            trainer.fit()
        it = trainer.learner
        moments = [t for name, t in it.tensors().items() if name.startswith("optimizer.") and t.ndim]
        return {
            "val_loss": trainer.evaluated[1]["val_loss"],
            "weights": sum(p.nbytes for p in it.model.parameters()),
            "optimizer": sum(t.nbytes for t in moments),
            "gradients": sum(p.nbytes for p in it.parameters),
        }


def evaluated(overrides: list[str], form: str | None, folder: Path) -> dict[str, float]:
    """The validation loss of the checkpoint in `folder` with its blocks' weights in `form`, and the bytes of the weights."""
    run = runs.composed([*overrides, "tracking=jsonl"])
    with build.trainer(run, folder) as trainer:
        model = trainer.learner.model
        if form is not None:
            quantize(model, form)  # type: ignore[arg-type]  # one of FORMATS
        found = run.task.evaluate(
            model, trainer.learner.loader.validation(None), ranks=trainer.learner.ranks, stop=lambda: False
        )
        return {"val_loss": found["val_loss"], "weights": sum(p.nbytes for p in model.parameters())}


def said(name: str, cells: list[dict[str, float]], base: list[dict[str, float]], numbers: int) -> str:
    """A row of the table: mean loss, the mean difference from `base` seed by seed and its spread, bytes a parameter."""
    gaps = [a["val_loss"] - b["val_loss"] for a, b in zip(cells, base, strict=True)]
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    held = " | ".join(f"{cells[0].get(kind, 0) / numbers:.2f}" for kind in ("weights", "gradients", "optimizer"))
    mean = statistics.mean(c["val_loss"] for c in cells)
    return f"| {name} | {mean:.4f} | {statistics.mean(gaps):+.4f} ± {spread:.4f} | {held} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    common = [
        f"steps={given.steps}",
        f"schedule.warmup={given.steps // 10}",
        "evaluation=end",
        "evaluation.sample_tokens=0",
        "checkpoint.every=0",
        *given.overrides,
    ]
    numbers = runs.composed(common).model.parameters()
    seeds = range(given.seeds)
    found: dict[str, list[dict[str, float]]] = {}
    print("| run | loss | gap | weights, B/parameter | gradients | optimizer |\n|---|---|---|---|---|---|", flush=True)
    for name, way in WAYS.items():
        found[name] = [learned([*common, *way], seed) for seed in seeds]
        print(said(name, found[name], found["fp32"], numbers), flush=True)
    with tempfile.TemporaryDirectory() as place:
        base = [*common, "name=base"]
        learned(base, 0, Path(place))
        formats = {form or "float32": [evaluated(base, form, Path(place) / "base")] for form in [None, *FORMATS]}
        for name, cells in formats.items():
            print(said(f"weights in {name}", cells, formats["float32"], numbers), flush=True)
        more = [*common, f"steps={given.steps // 3}", f"schedule.warmup={given.steps // 30}", "start_from=base"]
        for name, way in ADAPTERS.items():
            cells = [
                learned([*more, *way, f"name={name.replace(' ', '-')}-{seed}"], seed + 1, Path(place)) for seed in seeds
            ]
            found[name] = cells
            print(said(f"on from there, {name}", cells, found["all of it"], numbers), flush=True)
    if given.out:
        given.out.write_text(json.dumps({"steps": given.steps, "runs": found, "formats": formats}, indent=1) + "\n")


if __name__ == "__main__":
    main()
