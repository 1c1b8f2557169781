"""A run goes on on any other mesh: the same weights in the end, and every number of its state, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL
from tests.ranks import in_ranks
from tests.test_elastic import close
from trainkit import build, launch
from trainkit import run as runs
from trainkit.checkpoint import find, load
from trainkit.errors import UserError
from trainkit.parallel import Parallel
from trainkit.slices import chunks

WHAT = [*SMALL, "data.batch=12", "steps=8", "checkpoint.every=2", "checkpoint.keep=9", "evaluation.sample_tokens=4"]
WHAT += ["model.depth=4", "model.width=32", "model.attention.heads=4", "model.mlp.activation=swiglu"]
PLAIN = ["precision=fp64", "optimizer=sgd", "optimizer.lr=0.1", "clip=0.5"]
WAY = [
    (4, 1, "parallel=ddp"),
    (2, 2, "parallel=tp"),
    (3, 3, "parallel=fsdp"),
    (2, 4, "parallel=pp"),
    (4, 5, "parallel=fsdp parallel.tp=2"),
    (4, 6, "parallel=hsdp"),
    (4, 7, "parallel=pp parallel.tp=2 parallel.schedule=interleaved"),
    (2, 8, "parallel=cp"),
]


def run(*overrides: str) -> None:
    """Train, as the command line does."""
    chosen = runs.composed([*WHAT, *overrides])
    with build.trainer(chosen, Path("runs") / chosen.name) as trainer:
        trainer.fit()


@pytest.mark.timeout(300)
def test_a_run_goes_on_on_any_mesh() -> None:
    run("name=whole", *PLAIN)
    for size, stop, mesh in WAY:
        in_ranks(size, run, "name=moved", *PLAIN, *mesh.split(), f"stop_at={stop}", "memory.microbatch=2")
    close("moved", "whole", 1e-9)


STATES = {
    "adamw": ["optimizer=adamw", "model.width=32"],
    "8bit": ["memory=8bit", "model.width=256", "model.mlp.activation=gelu"],
}
TO = {
    2: ["parallel=tp", "parallel=pp", "parallel=fsdp"],
    4: ["parallel=fsdp parallel.tp=2", "parallel=pp parallel.tp=2", "parallel=hsdp", "parallel=fsdp parallel.pp=2"],
}


def the_same(meshes: list[str], words: list[str], there: dict[str, Any]) -> None:
    """Load the run's newest checkpoint on each mesh, and compare every number with what is on the disk."""
    joined = Parallel(kind="ddp", device="cpu").join(torch.device("cpu"))
    for mesh in meshes:
        chosen = runs.composed([*WHAT, *words, *mesh.split(), "parallel.device=cpu"])
        it = build.learner(chosen, chosen.data.open(), chosen.parallel.lay_out(joined))
        loaded = launch_load(it)
        it.load(*loaded)
        seen = set()
        for name, tensor in it.tensors().items():
            for offset, shape, part in chunks(tensor) if name.startswith(("model.", "optimizer.")) else []:
                whole = torch.from_numpy(there[name])
                assert torch.equal(part, whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]), (
                    mesh,
                    name,
                )
                seen.add(name)
        everywhere = {name for names in joined.host.gather(sorted(seen)) for name in names}
        assert everywhere == there.keys(), mesh
        it.train_step()  # and it can be learned with
    joined.leave()


def launch_load(it: Any) -> tuple[Any, Any]:
    """A checkpoint's tensors, read straight into the places that a learner gives, and its state."""
    from trainkit.checkpoint import store

    found = store.read(find.resolve("begun", Path("runs"), launch.policy), it.places)
    return found.tensors, found.state["learner"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("states", STATES)
def test_states_lie_on_any_mesh_as_they_were_saved(states: str) -> None:
    words = ["name=begun", "stop_at=2", *STATES[states]]
    in_ranks(4, run, *words, "parallel=fsdp", "parallel.tp=2")
    saved = load(find.resolve("begun", Path("runs"), launch.policy)).tensors
    assert any("_int8_scale" in name for name in saved) == (states == "8bit")
    there = {n: t.numpy() for n, t in saved.items() if n.startswith(("model.", "optimizer."))}
    for size, meshes in TO.items():
        in_ranks(size, the_same, meshes, words, there)
    run(*words)  # one process


def test_blocks_of_few_bits_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="memory.states keeps 128 numbers of a row together, and parallel.tp=2 cuts rows of 32"
    ):
        build.check(runs.composed([*WHAT, "memory=8bit", "parallel=tp"]))
