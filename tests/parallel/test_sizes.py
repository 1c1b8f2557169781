"""Meshes by arithmetic: what sizes mean, what does not divide, what cannot go together, what auto chooses."""

import itertools
from pathlib import Path

import pytest

from tests.conftest import SMALL
from tests.parallel.test_neutral import MESHES
from trainkit import build, spread
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.parallel import Shape, Sizes
from trainkit.parallel.auto import chosen
from trainkit.parallel.pipeline import microbatches, stages_of
from trainkit.parallel.sizes import AXES
from trainkit.parallel.together import REFUSED


def of(world: int, *words: str, monkeypatch: pytest.MonkeyPatch, machine: int | None = None) -> Sizes:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(machine or world))
    run = runs.composed([*SMALL, *words])
    build.check(run)
    return run.parallel.sizes()


@pytest.mark.parametrize(
    ("world", "words", "expected"),
    [
        (4, "parallel=ddp", Sizes(dp_replicate=4)),
        (4, "parallel=fsdp", Sizes(dp_shard=4)),
        (4, "parallel=hsdp", Sizes(dp_replicate=2, dp_shard=2)),
        (4, "parallel=hsdp parallel.dp_replicate=4", Sizes(dp_replicate=4)),
        (2, "parallel=tp", Sizes(tp=2)),
        (2, "parallel=pp", Sizes(pp=2)),
        (4, "parallel=cp", Sizes(cp=4)),
        (4, "parallel=fsdp parallel.tp=2", Sizes(dp_shard=2, tp=2)),
        (8, "parallel=fsdp parallel.tp=2 parallel.pp=2", Sizes(dp_shard=2, tp=2, pp=2)),
        (8, "parallel=tp parallel.tp=2 parallel.dp_replicate=-1", Sizes(dp_replicate=4, tp=2)),
        (4, "parallel.tp=2 parallel.cp=2", Sizes(tp=2, cp=2)),
        (1, "parallel=fsdp", Sizes()),
    ],
)
def test_sizes_are_presets_and_what_is_given(
    world: int, words: str, expected: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of(world, "data.batch=8", *words.split(), monkeypatch=monkeypatch) == expected


def test_hybrid_slices_lie_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of(8, "parallel=hsdp", "data.batch=8", monkeypatch=monkeypatch, machine=2) == Sizes(
        dp_replicate=4, dp_shard=2
    )


@pytest.mark.parametrize(
    ("world", "words", "why"),
    [
        (4, "parallel=single", "parallel=single trains in one process, but torchrun started 4"),
        (4, "parallel=fsdp parallel.tp=3", r"4 ranks do not divide by parallel.tp=3: use parallel.tp=1, 2 or 4"),
        (6, "parallel.tp=2 parallel.cp=2", "is 4 ranks, and there are 6: use sizes whose product is 2, 3 or 6"),
        (4, "parallel.tp=2", r"parallel.tp=2 is 2 ranks, and there are 4: add parallel.dp_shard=-1 for the rest"),
        (1, "parallel.tp=2", r"parallel.tp=2 is 2 ranks, and there are 1: start 2 with torchrun"),
        (8, "parallel=ddp parallel.tp=2 parallel.cp=3", "parallel.cp=3 × parallel.tp=2, which is 6: use sizes"),
        (4, "parallel=tp", r"model.attention.heads=2 does not divide by parallel.tp=4: use 1 or 2"),
        (2, "parallel=tp model.attention.kv_heads=1", "model.attention.kv_heads=1 does not divide by parallel.tp=2: use 1"),
        (2, "parallel=tp model.mlp.hidden=33", "the width of model.mlp=33 does not divide by parallel.tp=2: use 1 or 3"),
        (2, "parallel=tp model.vocab=257", "model.vocab=257 does not divide by parallel.tp=2: use 1 or 257"),
        (4, "parallel=pp", "model.depth=2 does not divide by parallel.pp=4: use 1 or 2"),
        (2, "parallel=pp parallel.schedule=zbv", "model.depth over 2 stages a rank=2 does not divide by parallel.pp=2: use 1"),
        (3, "parallel=cp", "data.length=32 does not divide by parallel.cp=3: use 1, 2 or 4"),
        (4, "parallel=cp parallel.tp=2 data.length=30", "by parallel.cp × parallel.tp=4: use data.length=32"),
        (3, "parallel=ddp", "data.batch=4 rows do not divide over 3 ranks: use 3 or 6"),
        (2, "parallel=pp data.batch=3", "3 rows, which do not make microbatches for parallel.pp=2: use data.batch=4"),
        (2, "parallel.tp=0", "parallel.tp=0 is no size: use 1 for none, or -1 for the rest"),
        (2, "parallel.tp=-1 parallel.cp=-1", "parallel.cp and parallel.tp cannot both be the rest"),
        (2, "parallel=tp parallel.dp_shard=-1", "parallel=tp and parallel.dp_shard=-1: say how many parallel.tp is"),
        (2, "parallel=auto parallel.tp=2", "parallel=auto chooses all sizes: leave parallel.tp out"),
        (2, "parallel=pp parallel.schedule=zbv memory=selective", "parallel.schedule=zbv goes back through a block twice"),
        (4, "parallel=fsdp parallel.pp=2 parallel.schedule=zbv", "parallel.schedule=zbv takes the gradients of weights"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_with_what_would(
    world: int, words: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=why):
        of(world, *words.split(), monkeypatch=monkeypatch)


TRIES = {
    "model.adapter": ["model/adapter=lora", "start_from=base"],
    "model.post_norm": ["model.post_norm=true"],
    "model.embed_norm": ["model.embed_norm=true"],
    "precision.float8": ["precision=bf16", "precision.float8.recipe=rowwise", "precision.float8.emulate=true"],
    "precision.rounding=stochastic": ["precision=bf16_pure"],
    "task=mlm": ["task=mlm", "model.attention.causal=false", "evaluation.sample_tokens=0"],
    "task=embedding": ["task=embedding", "data=stsb", "evaluation.metric=val_loss"],
    "memory.fused_loss=off": ["memory.fused_loss=off"],
    "memory=step_in_backward": ["memory=step_in_backward", "clip=0"],
    "memory=stream": ["memory=stream"],
}


@pytest.mark.parametrize(
    ("axis", "words", "why"), [(axis, words, why) for axes, words, _, why in REFUSED for axis in axes]
)
def test_what_cannot_go_together_is_refused_by_name(axis: str, words: str, why: str) -> None:
    asked = TRIES.get(words, [words])
    small = [] if words == "task=embedding" else SMALL
    runs.composed([*small, *asked])  # by itself it can be done
    with pytest.raises(UserError) as found:
        runs.composed([*small, *asked, f"parallel={axis}"])
    assert words in str(found.value)
    assert why in str(found.value)


SHAPE = Shape(heads=8, kv_heads=4, hidden=64, vocab=256, depth=6, length=32)
GB = 1 << 30


@pytest.mark.parametrize(
    ("world", "machine", "batch", "state", "expected"),
    [
        (1, 1, 8, GB, Sizes()),
        (8, 8, 64, GB, Sizes(dp_replicate=8)),  # it fits on each
        (8, 8, 64, 100 * GB, Sizes(dp_shard=8)),
        (16, 8, 64, 200 * GB, Sizes(dp_replicate=2, dp_shard=8)),  # it fits on a machine
        (16, 8, 64, 500 * GB, Sizes(dp_shard=16)),
        (16, 8, 4, GB, Sizes(dp_replicate=4, tp=4)),  # few rows: layers are shared, as far as heads divide
        (16, 8, 4, 100 * GB, Sizes(dp_replicate=4, tp=4)),  # it fits, shared so
        (64, 8, 4, 500 * GB, Sizes(dp_shard=4, cp=4, tp=4)),
    ],
)
def test_auto_is_arithmetic(world: int, machine: int, batch: int, state: int, expected: Sizes) -> None:
    assert chosen(world, machine, SHAPE, batch, state, memory=80 * GB) == expected


def test_auto_leaves_out_a_pipeline_whose_rows_do_not_divide() -> None:
    """Heads and length go into no two ranks, so that only the depth is left to be shared; of 6 rows two replicas have 3."""
    odd = Shape(heads=7, kv_heads=7, hidden=7, vocab=7, depth=4, length=7)
    assert chosen(4, 4, odd, 8, GB, memory=80 * GB) == Sizes(dp_replicate=4)
    with pytest.raises(UserError, match="finds no mesh of 4 ranks for data.batch=6: use data.batch=4"):
        chosen(4, 4, odd, 6, GB, memory=80 * GB)


def test_auto_is_a_mesh_of_the_ranks_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    run = runs.composed([*SMALL, "parallel=auto"])
    assert spread.settled(run).parallel.sizes() == Sizes(dp_replicate=4, tp=2)
    assert run.yaml().count("kind: auto") == 1
    with pytest.raises(UserError, match="parallel=auto chose dp_replicate 4 × tp 2, and optimizer=muon cannot go with"):
        spread.settled(runs.composed([*SMALL, "parallel=auto", "optimizer=muon"]))
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(UserError, match="parallel=auto finds no mesh of 7 ranks for data.batch=4: use data.batch=7"):
        spread.settled(runs.composed([*SMALL, "parallel=auto"]))


def test_a_rank_has_one_place_on_every_axis() -> None:
    sizes = Sizes(pp=2, dp_replicate=3, dp_shard=2, cp=1, tp=2)
    places = [tuple(sizes.at(rank)[axis] for axis in AXES) for rank in range(sizes.world)]
    assert places == list(itertools.product(range(2), range(3), range(2), range(1), range(2)))


def test_every_stage_has_one_rank_and_every_microbatch_is_whole() -> None:
    for schedule in ("1f1b", "interleaved", "zbv"):
        for size in (2, 3, 4):
            numbers = sorted(n for rank in range(size) for n in stages_of(schedule, rank, size))
            assert numbers == list(range(len(numbers)))
    assert stages_of("zbv", 0, 4) == (0, 7)
    assert [microbatches(12, rows, 2) for rows in (12, 6, 3, 2, 1)] == [2, 2, 4, 6, 12]
    assert microbatches(9, 2, 3) == 9


def test_the_documents_table_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    rows = [
        line for line in text.splitlines() if line.startswith("| `") and text.index(line) > text.index("| what | is")
    ]
    assert rows == [f"| `{words}` | {', '.join(f'`{axis}`' for axis in axes)} |" for axes, words, _, _ in REFUSED]
    assert f"trains {sum(map(len, MESHES.values()))} meshes" in text


def test_groups_that_come_and_go_are_refused_by_name() -> None:
    with pytest.raises(
        UserError, match=r"parallel.replicas would make what is learned depend on who was there.*nodes=1:2"
    ):
        runs.composed([*SMALL, "name=x", "parallel=ddp", "parallel.replicas=2"])
