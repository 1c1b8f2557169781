"""Every loss, by the sizes of microbatches, by the ranks, by the memory strategies: the weights are those of one process that
takes the whole batch at once, with nothing saved."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL as TEXT
from tests.hf_models import folder
from tests.memory.test_grades import words
from tests.ranks import in_ranks
from tests.test_chat import chats
from tests.test_dpo import pairs as preferences
from tests.test_embedding import IDS
from tests.test_embedding import LOSSES as EMBEDDING
from tests.test_embedding_runs import SMALL as PAIRS
from tests.test_embedding_runs import words_of, write_pairs
from trainkit import build
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.parallel import Parallel, Ranks
from trainkit.run import Run

STEPS = 3
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}
SGD = [
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "clip=0",
    "model.dropout=0",
    "data.batch=8",
    "parallel.device=cpu",
    "name=t",
]
TUNED = [word for word in TEXT if not word.startswith(("model.", "data"))]
TUNED += ["model=hf", "model.name=llama", "data.length=48", "data.validation=0.2"]
LOSSES: dict[str, list[str]] = {
    **{name: [*PAIRS, *words_of(loss), *SGD] for name, loss in zip(IDS, EMBEDDING, strict=True)},
    "causal_lm": [*TEXT, *SGD],
    "mlm": [*TEXT, *SGD, "task=mlm", "model.attention.causal=false", "evaluation.sample_tokens=0"],
    "sft": [*TUNED, *SGD, "task=sft", "data=chat", "data.path=chats.jsonl"],
    "dpo": [
        *TUNED,
        *SGD,
        "task=dpo",
        "data=preferences",
        "data.path=preferred.jsonl",
        "model.adapter=lora",
        "model.adapter.dropout=0",
        "optimizer.lr=1",
    ],
}
STRATEGIES = [
    "baseline",
    "checkpoint",
    "offload_activations",
    "offload_optimizer",
    "step_in_backward",
    "stream",
    "fused_loss",
]
ROWS = [3, 1, None, 4]  # at once; 3 leaves a rest of any rank's 8 or 4
Weights = dict[str, torch.Tensor]


def files(place: Path) -> None:
    folder("llama", place)
    chats(place, 24)
    preferences(place).rename("preferred.jsonl")
    write_pairs()


def base(loss: str, precision: str, dropout: float = 0.0) -> Run:
    return runs.composed([*LOSSES[loss], f"precision={precision}", f"model.dropout={dropout}"])


def learned(run: Run, ranks: Ranks) -> Weights:
    """All weights after some steps, each in one piece."""
    it = build.learner(run, run.data.open(), ranks)
    for _ in range(STEPS):
        it.train_step()
    return {name: ranks.whole(p.detach()).double().clone() for name, p in it.model.named_parameters()}


def cells(loss: str) -> Iterator[tuple[str, str, int | None]]:
    """Strategies, each with a precision and rows at once: in turn, so that a loss meets all of them."""
    for number, strategy in enumerate(STRATEGIES):
        turn = number + list(LOSSES).index(loss)
        at_once = None if strategy == "step_in_backward" else ROWS[turn % len(ROWS)]  # it adds no gradients up
        yield strategy, ("fp64", "fp32")[turn % 2], at_once


def near(ours: Weights, theirs: Weights, tolerance: float, said: object) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        worst = float((ours[name] - tensor).abs().max()) / max(float(tensor.abs().max()), 1e-30)
        assert worst <= tolerance, (said, name, worst)


def check(kind: str, on: Callable[[str, bool], Ranks], alone: dict[tuple[str, str], Any]) -> None:
    """Every loss and strategy of one kind of parallelism. `on` gives the ranks for it, or for streamed slices."""
    memories = {name: runs.composed([*TEXT, *SGD, *words(name)]).memory for name in STRATEGIES}
    parallel = Parallel(kind=kind, device="cpu")  # type: ignore[arg-type]  # one of its kinds
    for loss in LOSSES:
        plain = {precision: replace(base(loss, precision), parallel=parallel) for precision in TOLERANCE}
        for strategy, precision, rows in cells(loss):
            if kind == "ddp" and strategy in ("stream", "step_in_backward"):
                with pytest.raises(UserError, match="parallel=ddp|parallel=fsdp"):
                    runs.composed([*LOSSES[loss], f"precision={precision}", "parallel=ddp", *words(strategy)])
                continue
            run = replace(plain[precision], memory=replace(memories[strategy], microbatch=rows))
            expected = {name: torch.from_numpy(array) for name, array in alone[loss, precision].items()}
            ours = learned(run, on(kind, strategy == "stream"))
            near(ours, expected, TOLERANCE[precision], (kind, loss, strategy, precision, rows))
        # what drops out does so alike, whatever is saved: to the bit
        drops = replace(base(loss, "fp32", 0.2), parallel=parallel)
        both = [
            learned(replace(drops, memory=replace(memories[name], microbatch=3)), on(kind, False))
            for name in ("baseline", "checkpoint")
        ]
        near(both[1], both[0], 0.0, (kind, loss, "dropout"))


def references() -> dict[tuple[str, str], Any]:
    """What one process learns of whole batches; as arrays, which can be sent to ranks."""
    found = {}
    for loss in LOSSES:
        for precision in TOLERANCE:
            run = base(loss, precision)
            it = learned(replace(run, memory=replace(run.memory, fused_loss="off")), build.ranks(run))
            found[loss, precision] = {name: tensor.numpy() for name, tensor in it.items()}
    return found


def on_ranks(alone: dict[tuple[str, str], Any]) -> None:
    joined = Parallel(kind="ddp", device="cpu").join(torch.device("cpu"))
    for kind in ("ddp", "fsdp"):
        check(
            kind,
            lambda kind, stream: Parallel(kind=kind, device="cpu").lay_out(joined, stream=stream),  # type: ignore[arg-type]
            alone,
        )
    joined.leave()


@pytest.mark.timeout(600)
def test_every_loss_is_the_same_however_it_is_made(place: Path) -> None:
    files(place)
    alone = references()
    moved = [loss for loss in LOSSES for name, now in alone[loss, "fp64"].items() if now.any()]
    assert set(moved) == set(LOSSES)
    streamed = build.ranks(runs.composed([*TEXT, "memory=stream", "name=t"]))
    try:
        check("single", lambda kind, stream: replace(streamed, kind="single", stream=stream), alone)
    finally:
        streamed.leave()
    in_ranks(2, on_ranks, alone, timeout=500)
