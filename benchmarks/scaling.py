"""Data parallelism on this machine's cores, next to plain torch: python -m benchmarks.scaling [--ranks 2]

Weak scaling: every rank is one thread and has `--rows` rows of its own. Ways take turns, a few steps each, in the same
processes and on the same cores, and a way's efficiency is its tokens a second over those of as many processes that do not
talk:

    single      one process with one thread, while the others sleep
    apart       as many processes as ranks at once, each with a model of its own: what the machine allows
    ddp, fsdp   trainkit's
    torch ddp   the same model in torch's DistributedDataParallel (bucket views), the same loss, norm and optimizer

`single` and `apart` are trainkit's learner on one rank; `torch single` is the plain loop without DDP.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.parallel import Parallel, Ranks
from trainkit.run import Run

GPT2 = [
    *("model=gpt2", "model.vocab=512", "model.depth=4", "data.length=256", "data=moby-dick", "schedule.warmup=2"),
    *("memory.fused_loss=off", "name=t", "parallel.device=cpu"),
]
CPU = torch.device("cpu")
Step = Callable[[], object]


class Ways:
    """The ways to train, as one of the ranks has them: each a step, and how many ranks make it together."""

    def __init__(self, rows: int, ranks: int, given: list[str]) -> None:
        self._rows, self._ranks, self._given = rows, ranks, given
        joined = Parallel(kind="ddp", device="cpu").join(CPU)
        self._joined = joined
        self.rank = joined.rank
        self.steps: dict[str, tuple[Step, bool, int]] = {
            "single": (self._alone(), False, 1),
            "ddp": (self._together("ddp"), True, ranks),
            "fsdp": (self._together("fsdp"), True, ranks),
            "torch single": (self._plain(DistributedDataParallel=None), False, 1),
            "torch ddp": (self._plain(DistributedDataParallel=DistributedDataParallel), True, ranks),
        }
        self.steps["apart"] = (self.steps["single"][0], True, ranks)

    def _run(self, ranks: int, *words: str) -> Run:
        return runs.composed([*GPT2, f"data.batch={self._rows * ranks}", *words, *self._given])

    def _alone(self) -> Step:
        run = self._run(1)
        return build.learner(run, run.data.open(), Ranks(CPU)).train_step

    def _together(self, kind: str) -> Step:
        run = self._run(self._ranks, f"parallel={kind}")
        return build.learner(run, run.data.open(), run.parallel.lay_out(self._joined)).train_step

    def _plain(self, *, DistributedDataParallel: Any) -> Step:
        """torch's own words for the same step."""
        run = self._run(1)
        torch.manual_seed(run.seed)
        model = run.task.build(run.model.build())
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if DistributedDataParallel else model
        cfg: Any = run.optimizer
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        data: Any = run.data
        loader = data.build(data.open(), seed=0, ranks=Ranks(CPU), device=CPU)
        at = iter(range(10**9))

        def step() -> None:
            batch = loader.at(next(at))
            loss = wrapped(batch["tokens"], batch["labels"], batch.get("documents")) / batch["labels"].numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def seconds(self, name: str, steps: int) -> float:
        """What `steps` steps of a way take, from when all ranks begin to when the last one is done."""
        step, all_, _ = self.steps[name]
        host = self._joined.host
        host.max(0)
        begin = time.perf_counter()
        if all_ or self.rank == 0:
            for _ in range(steps):
                step()
        host.max(0)
        return time.perf_counter() - begin

    def leave(self) -> None:
        """Part."""
        self._joined.leave()


def one_rank(rows: int, ranks: int, rounds: int, steps: int, given: list[str]) -> dict[str, list[float]]:
    """Tokens a second of every way, round after round."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # a core each, as a GPU would be
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    runs.composed([*GPT2, *given]).speed.begin(CPU, torch.float32)  # of the process, and so of all ways
    ways = Ways(rows, ranks, given)
    found: dict[str, list[float]] = {name: [] for name in ways.steps}
    for name in ways.steps:
        ways.seconds(name, 1)  # warm
    for _ in range(rounds):
        for name, (_, _, together) in ways.steps.items():
            found[name].append(together * rows * 256 * steps / ways.seconds(name, steps))
    ways.leave()
    return found


def table(found: dict[str, list[float]], ranks: int) -> list[str]:
    """Medians over rounds; efficiency is paired by round."""
    lines = ["| way | tokens/s | of a process alone | of processes apart |", "|---|---|---|---|"]
    for name, rates in found.items():
        many = 1 if name in ("single", "torch single") else ranks
        own = found["torch single"] if name.startswith("torch") else found["single"]
        alone = statistics.median(r / many / s for r, s in zip(rates, own, strict=True))
        apart = statistics.median(r / a for r, a in zip(rates, found["apart"], strict=True)) if many > 1 else None
        low, high = min(rates), max(rates)
        middle = statistics.median(rates)
        beside = "" if apart is None else f"{apart:.1%}"
        lines.append(f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {alone:.1%} | {beside} |")
    ratio = statistics.median(a / b for a, b in zip(found["ddp"], found["torch ddp"], strict=True))
    return [*lines, "", f"trainkit's ddp is {ratio:.3f} times as fast as torch's (median over rounds)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of 256 tokens, a rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a way in a round")
    parser.add_argument("words", nargs="*", help="overrides")
    given = parser.parse_args()
    if "RANK" in os.environ:
        found = one_rank(given.rows, given.ranks, given.rounds, given.steps, given.words)
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    said = in_ranks(given.ranks, "benchmarks.scaling", sys.argv[1:], {"OMP_NUM_THREADS": "1"})
    print("\n".join(table(json.loads(said[0].splitlines()[-1]), given.ranks)))


if __name__ == "__main__":
    main()
