"""What would fit, and the largest microbatch."""

import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from trainkit import run as runs
from trainkit.choices import choices
from trainkit.errors import UserError
from trainkit.parallel import Sizes
from trainkit.plan import bounds, candidates, cards, report, search
from trainkit.plan import planned as planning
from trainkit.plan.candidates import Candidates
from trainkit.plan.cards import CARDS
from trainkit.plan.live import OutOfTimeError
from trainkit.plan.planned import Plan, Setting
from trainkit.run import Run

H100 = cards.CARDS["h100"]
QUICK = ["model.width=32", "model.depth=2", "model.attention.heads=2", "data.length=32", "data.batch=4"]


def made(setting: Setting, needed: int, step_s: float, microbatch: int) -> Plan:
    return Plan(
        setting=setting,
        parameters=10,
        flops_per_token=60.0,
        peaks={"training": needed},
        by_category={"parameters": needed},
        needed=needed,
        host_bytes=0,
        talk=(),
        moved_bytes=0,
        checkpoint_bytes=30,
        microbatch=microbatch,
        steps=100,
        tokens_per_step=1000,
        step_s=step_s,
        depths=(3, 4, 5),
    )


def arithmetic(run: Run, setting: Setting, **how: Any) -> Plan:
    """A plan without a trace: 8 GB a row; checkpointing saves 6 of them, offloading 5, and both take time."""
    rows = search.rows_of(run, setting)
    rows = min(run.memory.microbatch or rows, rows)
    each, seconds = 8.0, 1.0 + 1.0 / rows
    if run.memory.checkpoint:
        each, seconds = each - 6, seconds * 1.3
    if run.memory.offload_activations:
        each, seconds = each - 1.5, seconds * 3
    if run.precision.compute:
        each, seconds = each * 0.9, seconds / 2
    return made(setting, int(each * rows * 1e9), seconds, rows)


@cache
def once(words: tuple[str, ...]) -> Run | UserError:
    try:
        return runs.composed(list(words))
    except UserError as error:
        return error


def composed(words: list[str], config_dir: None) -> Run:
    """`runs.composed`, of which several searches ask the same hundreds of times."""
    found = once(tuple(words))
    if isinstance(found, UserError):
        raise found
    return found


def found(monkeypatch: pytest.MonkeyPatch, memory_gb: float, *overrides: str, ranks: int = 1) -> list[search.Found]:
    monkeypatch.setattr(search, "plan", arithmetic)
    monkeypatch.setattr(candidates, "runs", SimpleNamespace(composed=composed))
    setting = Setting(replace(H100, memory=memory_gb), ranks)
    return search.Search(list(overrides), None, setting, 1e6, lambda text: None).best()


def test_what_fits_comes_exact_first_and_fast_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = found(monkeypatch, 10, "data.batch=8")
    assert [w.plan.fits for w in ways] == sorted((w.plan.fits for w in ways), reverse=True)
    fit = [w for w in ways if w.plan.fits]
    assert [search.GRADES.index(w.grade) for w in fit] == sorted(search.GRADES.index(w.grade) for w in fit)
    exact = [w for w in fit if w.grade == "exact"]
    assert [w.plan.step_s for w in exact] == sorted(w.plan.step_s for w in exact)
    assert exact[0].overrides == ("data.batch=8", "memory=selective", "memory.microbatch=4")
    assert fit[-1].grade == "changes what is learned"


def test_what_a_person_chose_is_replaced_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "data.batch=8",
        "memory=checkpoint",
        "memory.checkpoint.every=2",
        "memory.microbatch=2",
        "optimizer.lr=0.1",
    ]
    ways = found(monkeypatch, 1000, *given)
    plain = next(w for w in ways if not any(o.startswith("memory=") for o in w.overrides) and w.grade == "exact")
    assert plain.overrides == ("data.batch=8", "optimizer.lr=0.1")
    kept = next(w for w in ways if "memory=checkpoint" in w.overrides)
    assert "memory.checkpoint.every=2" in kept.overrides
    for way in ways:
        runs.composed(list(way.overrides))


def test_every_choice_is_a_candidate_and_its_words_say_it() -> None:
    given = ["data.batch=8", "memory.checkpoint.every=2", "precision=fp32"]
    every = list(Candidates(given, None, Setting(H100)))
    words = " ".join(word for c in every for word in c.overrides)
    for name in choices()["memory"]:
        assert name in ("baseline", "default", "fused_loss") or name in words  # the loss is in chunks where it is large
    for wanted in ("precision=bf16_pure", "precision=fp8", "model.adapter=qlora", "clip=0"):
        assert wanted in words
    assert len({c.overrides for c in every}) == len(every)
    for candidate in every[:: len(every) // 12]:
        said = runs.composed(list(candidate.overrides))
        assert said == replace(candidate.run, name=said.name)
    assert all(c.grade == "changes what is learned" for c in every if c.changes)


def test_arithmetic_leaves_out_what_cannot_fit_and_nothing_else() -> None:
    run = runs.composed(["model=M7B", "precision=bf16"])
    card = Setting(CARDS["rtx4090"])
    assert bounds.most_rows(run, card) == 0
    assert bounds.least_bytes(run, card) == 16 * run.model.parameters()
    streamed = runs.composed(["model=M7B", "precision=bf16", "memory=stream+checkpoint"])
    assert bounds.most_rows(streamed, card) == 16
    assert (
        bounds.least_seconds(streamed, card) > 3 * 4 * run.model.parameters() / 25e9
    )  # all comes twice, and leaves once
    in_4_bits = runs.composed(["model=M7B", "model.adapter=qlora", "start_from=x"])
    assert 3.5e9 < bounds.least_bytes(in_4_bits, card) < 5e9


@pytest.mark.parametrize("how", ["baseline", "8bit", "4bit+checkpoint", "offload_optimizer", "stream+checkpoint"])
def test_no_plan_is_below_the_bound(how: str) -> None:
    shape = ["model=tiny", "model.depth=3", "data.batch=4", "data.length=64"]
    setting = Setting(H100)
    run = runs.composed([*shape, f"memory={how}"])
    found = planning.plan(run, setting)
    rows = 4 * bounds.row_bytes(run)
    assert bounds.least_bytes(run, setting) <= found.peaks["training"]
    assert rows <= found.peaks["training"]
    assert bounds.least_seconds(run, setting) <= found.step_s


def test_what_takes_too_long_does_not_hold_up_the_rest() -> None:
    run = runs.composed(["model=M7B"])
    with pytest.raises(OutOfTimeError):
        planning.plan(run, Setting(H100), until=time.monotonic() + 0.05)


def test_where_nothing_fits_the_nearest_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = found(monkeypatch, 0.1, "data.batch=8")
    assert not any(w.plan.fits for w in ways)
    assert [w.plan.needed for w in ways] == sorted(w.plan.needed for w in ways)
    assert "memory.microbatch=1" in ways[0].overrides


def test_of_several_cards_every_mesh_is_a_candidate() -> None:
    shape = ["model.attention.heads=4", "model.attention.kv_heads=2", "model.depth=4", "data.batch=8", "data.length=32"]
    every = list(Candidates(shape, None, Setting(H100, 8)))
    meshes = {c.run.parallel.sizes(8, 1) for c in every}
    for one in (Sizes(dp_replicate=8), Sizes(dp_shard=8), Sizes(dp_replicate=2, dp_shard=4), Sizes(dp_shard=4, tp=2)):
        assert one in meshes
    assert {m.tp for m in meshes} == {1, 2}  # as the heads of keys divide
    assert Sizes(pp=4, dp_replicate=2) in meshes
    assert not any(m.pp == 8 for m in meshes)  # as the depth does not
    for c in every[:: len(every) // 12]:
        said = runs.composed(list(c.overrides))
        assert said == replace(c.run, name=said.name)


def test_a_mesh_that_a_person_gave_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["parallel=fsdp", "parallel.tp=2", "data.batch=16"]
    ways = found(monkeypatch, 1000, *given, ranks=16)
    assert {w.plan.setting.ranks for w in ways} == {16}
    assert all(set(given) <= set(w.overrides) for w in ways)
    line = report.command(ways[0])
    assert line.startswith("torchrun --nnodes=2 --nproc_per_node=8 -m trainkit train parallel=fsdp parallel.tp=2 data")


def test_a_batch_that_nobody_gave_may_grow_with_the_ranks() -> None:
    def batches(*words: str) -> set[int]:
        return {c.run.data.batch for c in Candidates([*words, "model.depth=1"], None, Setting(H100, 32))}

    assert batches() == {16, 32}
    assert batches("data.batch=16") == {16}
    grown = [c for c in Candidates(["model.depth=1"], None, Setting(H100, 32)) if c.run.data.batch == 32]
    assert {c.grade for c in grown} == {"changes what is learned"}
    assert all("data.batch=32" in c.changes for c in grown)


def test_a_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "plan", arithmetic)
    seeking = search.Search([], None, Setting(H100), 0.0, lambda text: None)
    assert seeking.best() == []
    assert seeking.cut_short


@pytest.mark.parametrize("most", range(23))
@pytest.mark.parametrize("rows", [1, 6, 16, 22])
def test_the_largest_microbatch_is_found(most: int, rows: int) -> None:
    asked: list[int] = []

    def at(size: int) -> Plan:
        asked.append(size)
        needed = 80e9 * size / most if most else 80e9 + size
        return made(Setting(H100), int(needed), 1.0, size)

    best = search.largest_microbatch(at, rows)
    fitting = [size for size in {1, 2, 4, 8, 16, rows} if size <= min(most, rows)]
    assert (best.microbatch if best.fits else 0) == max(fitting, default=0)
    assert len(asked) == len(set(asked)) <= 4


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_gradients_that_wait_for_other_rows_are_seen(most: int) -> None:
    def at(size: int) -> Plan:
        waiting = 20e9 if size < 16 else 0
        return made(Setting(H100), int(60e9 * size / most + waiting), 1.0, size)

    assert search.largest_microbatch(at, 16).microbatch == most


def test_no_more_rows_are_tried_than_may_fit() -> None:
    asked: list[int] = []

    def at(size: int) -> Plan:
        asked.append(size)
        return made(Setting(H100), 1, 1.0, size)

    assert search.largest_microbatch(at, 16, 4).microbatch == 4
    assert asked == [4]


def test_lines_are_quoted_for_a_shell() -> None:
    way = search.Found(("data.path=my texts", "~tracking.jsonl", "a=1"), "exact", made(Setting(H100), 1, 1.0, 1), "")
    assert report.command(way) == "trainkit train 'data.path=my texts' '~tracking.jsonl' a=1"
