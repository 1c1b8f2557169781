"""How a model begins on ranks: with the weights of one process, to the bit, and never whole on one of them."""

import gc
import weakref
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tests.memory.allocated import most_allocated
from tests.ranks import in_ranks
from trainkit import build, randomness
from trainkit import run as runs
from trainkit.learner import MODEL
from trainkit.models.decoder import fresh
from trainkit.parallel import Parallel
from trainkit.run import Run
from trainkit.slices import chunks

SHAPE = [*SMALL, "model.depth=2", "model.width=32", "model.attention.heads=4", "data.batch=8", "name=t"]
KINDS = {
    2: ["fsdp", "tp", "pp", "cp"],
    4: ["hsdp", "fsdp parallel.tp=2", "fsdp parallel.pp=2", "pp parallel.tp=2"],
}


def drawn(run: Run) -> dict[str, torch.Tensor]:
    """What a model begins with, in the order in which it has always been drawn: embedding, then layer by layer."""
    randomness.seed_all(run.seed)
    cfg, wide = run.model, run.model.width
    hidden, small = cfg.mlp.width(wide), 0.02 / (2 * cfg.depth) ** 0.5
    order = [("embed", (cfg.vocab, wide), 0.02)]
    for i in range(cfg.depth):
        order += [
            (f"blocks.{i}.attention.qkv", (3 * wide, wide), 0.02),
            (f"blocks.{i}.attention.out", (wide, wide), small),
            (f"blocks.{i}.mlp.into", (2 * hidden, wide), 0.02),
            (f"blocks.{i}.mlp.out", (wide, hidden), small),
        ]
    return {f"backbone.{name}.weight": torch.empty(shape).normal_(std=std) for name, shape, std in order}


def begun(run: Run, ranks: Any) -> dict[str, Any]:
    it = build.learner(run, run.data.open(), ranks)
    return {k.removeprefix(MODEL): t for k, t in it.tensors().items() if k.startswith(MODEL)}


def test_one_process_begins_as_it_always_has() -> None:
    run = runs.composed([*SHAPE, "model.mlp.activation=swiglu"])
    found, expected = begun(run, build.ranks(run)), drawn(run)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected.get(name, torch.ones(32))), name
    assert expected.keys() <= found.keys()


def the_same(kinds: list[str], expected: dict[str, Any]) -> None:
    joined = Parallel(kind="ddp", device="cpu").join(torch.device("cpu"))
    seen = set()
    for kind in kinds:
        run = runs.composed([*SHAPE, "model.mlp.activation=swiglu", *f"parallel={kind}".split(), "parallel.device=cpu"])
        for name, tensor in begun(run, run.parallel.lay_out(joined)).items():
            for offset, shape, part in chunks(tensor):
                whole = torch.from_numpy(expected[name]) if name in expected else torch.ones(32)
                assert torch.equal(part, whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]), (
                    name
                )
            seen.add(name)
    assert expected.keys() <= seen
    joined.leave()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", KINDS)
def test_ranks_begin_as_one_process_does(size: int) -> None:
    run = runs.composed([*SHAPE, "model.mlp.activation=swiglu"])
    in_ranks(size, the_same, KINDS[size], {name: t.numpy() for name, t in drawn(run).items()})


def test_one_layer_is_there_at_a_time() -> None:
    before: weakref.ref[Any] | None = None
    for _, tensor in fresh(runs.composed(SHAPE).model):
        held = weakref.ref(tensor.untyped_storage())
        del tensor
        gc.collect()
        assert before is None or before() is None
        before = held


def never_whole(kind: str, words: list[str]) -> None:
    run = runs.composed([*words, *f"parallel={kind}".split(), "parallel.device=cpu"])
    ranks = build.ranks(run)
    corpus = run.data.open()
    made: list[Any] = []
    peak = most_allocated(lambda: made.append(build.learner(run, corpus, ranks)))
    whole, largest = 4 * run.model.parameters(), 4 * run.model.vocab * run.model.width
    held = [t.nbytes for n, part in made[0].tensors().items() if n.startswith(MODEL) for *_, t in chunks(part)]
    assert sum(held) < 0.51 * whole
    assert sum(held) + 0.9 * largest < peak < sum(held) + 1.1 * largest, f"{peak / 1e6:.1f} MB of {whole / 1e6:.1f}"
    ranks.leave()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["fsdp", "tp", "pp"])
def test_a_model_is_never_whole_on_a_rank(kind: str) -> None:
    """Half of it, and the largest matrix beside it."""
    big = [*SHAPE, "model.width=128", "model.depth=8", "model.vocab=2048", "model.tied=false", "data.batch=2"]
    in_ranks(2, never_whole, kind, big)
