"""The same weights as one process, whatever the mesh: strategies, by models, memory strategies and precisions."""

import pytest

from tests.parallel.laid_out import MODELS, Learned, neutral, reference
from tests.ranks import in_ranks

MESHES = {
    2: [
        "parallel=ddp",
        "parallel=fsdp",
        "parallel=fsdp parallel.reshard=false parallel.prefetch=2",
        "parallel=tp",
        "parallel=cp",
        "parallel=pp",
        "parallel=pp parallel.schedule=gpipe",
        "parallel=pp parallel.schedule=interleaved",
        "parallel=pp parallel.schedule=zero_bubble",
        "parallel=pp parallel.schedule=zbv",
    ],
    3: ["parallel=ddp", "parallel=fsdp", "parallel=cp"],
    4: [
        "parallel=hsdp",
        "parallel=fsdp parallel.reshard=2",
        "parallel=fsdp parallel.tp=2",
        "parallel=fsdp parallel.cp=2",
        "parallel=hsdp parallel.cp=2",
        "parallel=fsdp parallel.pp=2",
        "parallel=fsdp parallel.pp=2 parallel.schedule=interleaved",
        "parallel=ddp parallel.tp=2",
        "parallel=ddp parallel.cp=2",
        "parallel=ddp parallel.pp=2",
        "parallel=cp parallel.tp=2",
        "parallel=pp parallel.tp=2",
        "parallel=pp parallel.cp=2",
    ],
}
# in turn with the meshes, so that each is met by several
HOWS = ["", "memory=checkpoint memory.microbatch=2", "memory=offload_activations", "memory.fused_loss=on", "clip=0.3"]


def cases(size: int, model: str, precision: str) -> list[tuple[list[str], Learned]]:
    known: dict[tuple[str, ...], Learned] = {}
    found = []
    shift = list(MODELS).index(model) + 2 * (precision == "fp32")
    for number, mesh in enumerate(MESHES[size]):
        words = [*MODELS[model], f"precision={precision}", *HOWS[(number + shift) % len(HOWS)].split()]
        if tuple(words) not in known:
            known[tuple(words)] = reference(words)
        found.append(([*words, *mesh.split()], known[tuple(words)]))
    return found


EVERY = [(size, "llama", "fp64") for size in MESHES] + [(size, "gpt2", "fp32") for size in MESHES]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("size", "model", "precision"), [*EVERY, (2, "llama", "fp32"), (2, "gpt2", "fp64")])
def test_ranks_learn_what_one_process_learns(size: int, model: str, precision: str) -> None:
    in_ranks(size, neutral, cases(size, model, precision), timeout=280)


def muons(size: int) -> list[tuple[list[str], Learned]]:
    words = [*MODELS["llama"], "optimizer=muon", "optimizer.lr=0.02", "precision=fp64"]
    meshes = {3: ["parallel=fsdp", "parallel=ddp"], 4: ["parallel=hsdp", "parallel=fsdp parallel.cp=2"]}[size]
    alone = reference(words)
    return [([*words, *mesh.split()], alone) for mesh in meshes]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [3, 4])
def test_muons_updates_are_those_of_whole_matrices(size: int) -> None:
    """It rounds to bfloat16 inside: to learn the same it has to be given the same, and not slices."""
    in_ranks(size, neutral, muons(size), timeout=280)
