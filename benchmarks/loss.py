"""The loss over a vocabulary of 50,304: whole logits, torch's linear_cross_entropy and trainkit's chunks, time and memory.

    python benchmarks/loss.py [--rows 1024 4096] [--width 384] [--dtype float32] [--rounds 3]

Forward and backward from hidden states; all ways take turns; medians. Memory is the most bytes that tensors took at once
beyond what was there before, the gradients that are left included, by torch's profiler. The last column is the largest
difference of a gradient from float64's, as a share of its largest value.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from trainkit.profile.allocations import Allocations
from trainkit.tasks.loss import summed_loss

VOCAB = 50_304


def ways() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Everything that can be compared with this torch."""
    found = {
        "whole logits": lambda h, w, y: summed_loss(h, w, y, "off"),
        "trainkit, in chunks": lambda h, w, y: summed_loss(h, w, y, "on"),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, no options"] = lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum")
        found["torch, in chunks"] = lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum", options=options)
    return found


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that tensors made in `work` take at once."""
    with Allocations(torch.nn.Module(), device=torch.device("cpu")) as seen:
        work()
    return seen.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    print("| positions | way | s | beside whole logits | MiB | gradient's error |\n|---|---|---|---|---|---|")
    for rows in chosen.rows:
        compare(rows, chosen.width, getattr(torch, chosen.dtype), chosen.rounds)


def compare(rows: int, width: int, dtype: torch.dtype, rounds: int) -> None:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw)
    unembed = torch.randn(VOCAB, width, generator=draw) * 0.02
    labels = torch.randint(0, VOCAB, (rows,), generator=draw)
    exact = gradients(ways()["trainkit, in chunks"], hidden.double(), unembed.double(), labels)
    hidden, unembed = hidden.to(dtype), unembed.to(dtype)
    seconds: dict[str, list[float]] = {way: [] for way in ways()}
    for _ in range(rounds + 1):
        for way, loss in ways().items():
            begin = time.perf_counter()
            gradients(loss, hidden, unembed, labels)
            seconds[way].append(time.perf_counter() - begin)
    base = statistics.median(seconds["whole logits"][1:])
    for way, loss in ways().items():
        median = statistics.median(seconds[way][1:])
        found = gradients(loss, hidden, unembed, labels)
        error = max(float((g.double() - e).abs().max() / e.abs().max()) for g, e in zip(found, exact, strict=True))
        del found
        mib = most_allocated(lambda loss=loss: gradients(loss, hidden, unembed, labels)) / 2**20
        print(f"| {rows} | {way} | {median:.2f} | {median / base:.2f} | {mib:.0f} | {error:.0e} |", flush=True)


def gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, unembed: Tensor, labels: Tensor
) -> list[Tensor]:
    leaves = [hidden.detach().requires_grad_(), unembed.detach().requires_grad_()]
    (loss(*leaves, labels) / len(labels)).backward()
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


if __name__ == "__main__":
    main()
