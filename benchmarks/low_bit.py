"""What optimizer states of fewer bits cost: in loss, in bytes, in time.

    python benchmarks/low_bit.py [--seeds 3] [--steps 200] [--models tiny wide] [--codes] [--time]

Trains each model on the embedded corpus with states of float32, int8, fp8 and int4, a run a seed, and prints the mean
validation loss after the last step, its difference from float32 seed by seed, and the standard deviation over the seeds of
float32. `--codes` prints the error of the codes on AdamW's states instead, beside Dettmers' dynamic tree; `--time` the time
of an optimizer's step beside torch's fused AdamW, and the bytes of state a parameter.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from trainkit import build
from trainkit import run as runs
from trainkit.optimizers import AdamW
from trainkit.optimizers.formats import CODES
from trainkit.optimizers.low_bit import Keeping

MODELS = {"tiny": ["model=tiny"], "wide": ["model=tiny", "model.width=256", "model.depth=3"]}
FORMATS = {"float32": "baseline", "int8": "8bit", "fp8": "fp8", "int4": "4bit"}
BETAS, EPS = (0.9, 0.99), 1e-8


def validation_loss(model: list[str], memory: str, steps: int, seed: int) -> float:
    """Train, and measure all of the validation split."""
    what = [*model, "data.length=64", "data.batch=8", f"steps={steps}", f"seed={seed}", "name=low-bit"]
    run = runs.composed([*what, f"memory={memory}"])
    ranks = build.ranks(run)
    it = build.learner(run, run.data.open(), ranks)
    for _ in range(steps):
        it.train_step()
    found = run.task.evaluate(it.model, it.loader.validation(None), ranks=ranks, stop=lambda: False)
    assert found is not None
    return found["val_loss"]


def losses(models: list[str], steps: int, seeds: int) -> None:
    print(
        "| model | states | validation loss | difference from float32, mean (seed by seed) | spread of float32's seeds |"
    )
    print("|---|---|---|---|---|")
    for name in models:
        found = {
            states: [validation_loss(MODELS[name], memory, steps, seed) for seed in range(seeds)]
            for states, memory in FORMATS.items()
        }
        spread = statistics.stdev(found["float32"])
        for states, values in found.items():
            gaps = [a - b for a, b in zip(values, found["float32"])]
            each = ", ".join(f"{gap:+.4f}" for gap in gaps)
            mean = f"{statistics.mean(gaps):+.4f} ({each})" if any(gaps) else "0"
            print(f"| {name} | {states} | {statistics.mean(values):.4f} | {mean} | {spread:.4f} |", flush=True)


def trained_states(blocks: int = 2048) -> tuple[Tensor, Tensor]:
    """Moments of AdamW after 300 steps on gradients whose sizes differ by orders of magnitude, in blocks of 128."""
    draw = torch.Generator().manual_seed(0)
    m = v = torch.zeros(blocks, 128)
    size = torch.exp(torch.randn(blocks, 1, generator=draw)) * torch.exp(torch.randn(blocks, 128, generator=draw))
    for _ in range(300):
        g = torch.randn(blocks, 128, generator=draw) * size * (torch.rand(blocks, 128, generator=draw) < 0.9)
        m, v = m.lerp(g, 1 - BETAS[0]), v.lerp(g * g, 1 - BETAS[1])
    return m, v


def dynamic_tree(signed: bool) -> Tensor:
    """The 256 numbers of Dettmers' dynamic tree: a decade for every zero bit, the rest of the byte linear in it."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)


def nearest(numbers: Tensor, table: Tensor) -> Tensor:
    scale = numbers.abs().amax(-1, keepdim=True)
    return table[torch.bucketize(numbers / scale, (table[1:] + table[:-1]) / 2)] * scale


def codes() -> None:
    m, v = trained_states()
    ways = {
        name: tuple(by[s].decode(*by[s].encode(x), 128) for s, x in ((True, m), (False, v)))
        for name, by in CODES.items()
    }
    ways["dynamic tree"] = nearest(m, dynamic_tree(True)), nearest(v, dynamic_tree(False))
    e4m3 = torch.float8_e4m3fn
    largest = m.abs().amax(-1, keepdim=True) / 448, v.amax(-1, keepdim=True) / 448
    ways["e4m3 of both"] = tuple((x / s).to(e4m3).float() * s for x, s in zip((m, v), largest))  # type: ignore[assignment]
    update = m / (v.sqrt() + EPS)
    print("| code | error of the update | of the first moment alone | of the second alone |")
    print("|---|---|---|---|")
    for name, (of_m, of_v) in ways.items():
        made = [a / (b.sqrt() + EPS) for a, b in ((of_m, of_v), (of_m, v), (m, of_v))]
        errors = [float(((u - update).square().mean() / update.square().mean()).sqrt()) for u in made]
        print(f"| {name} | " + " | ".join(f"{100 * error:.3g} %" for error in errors) + " |")


class Matrices(torch.nn.Module):
    """The shapes of six GPT-2-like blocks of width 384, and a vocabulary of 8,192: 13.8M parameters."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(8192, 384)] + [(1152, 384), (384, 384), (1536, 384), (384, 1536)] * 6
        self.matrices = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)


def times(rounds: int = 15) -> None:
    ways = {"float32, torch's fused": None} | {
        f"{name or 'float32, ours'}, {'compiled' if compiled else 'eager'}": Keeping(name, compiled)
        for name in (None, *CODES)
        for compiled in (False, True)
    }
    made, seconds = {}, {way: [] for way in ways}
    for way, keeping in ways.items():
        model = Matrices()
        made[way] = model, AdamW(lr=1e-3).build(model, keeping)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        made[way][1].step()
    for _ in range(rounds):
        for way, (_, optimizer) in made.items():
            begin = time.perf_counter()
            optimizer.step()
            seconds[way].append(time.perf_counter() - begin)
    print("| states | ms a step | bytes of state a parameter |\n|---|---|---|")
    for way, (model, optimizer) in made.items():
        held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        size = sum(p.numel() for p in model.parameters())
        print(f"| {way} | {1000 * statistics.median(seconds[way]):.0f} | {held / size:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--codes", action="store_true")
    parser.add_argument("--time", action="store_true")
    chosen = parser.parse_args()
    if chosen.codes or chosen.time:
        (codes if chosen.codes else times)()
    else:
        losses(chosen.models, chosen.steps, chosen.seeds)


if __name__ == "__main__":
    main()
