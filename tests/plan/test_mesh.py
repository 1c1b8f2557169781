"""Plans of ranks that share more than rows: what they hold and send, against arithmetic and against real processes."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_ranks as bench
from tests.ranks import in_ranks
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.parallel import Parallel, Sizes
from trainkit.plan import bounds
from trainkit.plan import planned as planning
from trainkit.plan.cards import CARDS, Card
from trainkit.plan.meshes import meshes, words
from trainkit.plan.planned import Plan, Setting, plan
from trainkit.plan.world import Line, looked_at, of_ranks

CPU = bench.NO_SPEED
H100 = CARDS["h100"]
WIDTH, LENGTH, VOCAB, DEPTH = 64, 32, 512, 4
SMALL = [f"model.width={WIDTH}", f"model.vocab={VOCAB}", f"data.length={LENGTH}", f"model.depth={DEPTH}", "name=t"]
SMALL += ["model.attention.heads=4", "evaluation.sample_tokens=8", "data.batch=8"]


def planned(ranks: int, *overrides: str, card: Card = H100) -> Plan:
    return plan(runs.composed([*SMALL, *overrides]), Setting(card, ranks))


def sent(found: Plan) -> dict[tuple[str, str], int]:
    return {(t.axes, t.collective): t.sent for t in found.talk if t.sent > 1000}


def test_ranks_that_share_layers_say_hidden_states_to_each_other() -> None:
    found = planned(2, "parallel=tp")
    hidden = 8 * LENGTH * WIDTH * 4 / 2  # of all rows, of which each rank sends its half
    each = 4 * DEPTH + 2  # two before and two after each block's layers, and at both ends
    assert sent(found) == {
        ("tp", "all-gather"): each * hidden,
        ("tp", "reduce-scatter"): each * hidden,
        ("tp", "all-reduce"): pytest.approx(sent(found)["tp", "all-reduce"]),
    }
    assert all(t.waited_for for t in found.talk)
    alone = planned(1)
    assert found.by_category["parameters"] == pytest.approx(alone.by_category["parameters"] / 2, rel=0.01)
    assert found.by_category["optimizer"] == pytest.approx(alone.by_category["optimizer"] / 2, rel=0.02)


def test_ranks_that_share_positions_gather_keys_and_values() -> None:
    found = planned(4, "parallel=cp")
    of_keys = 8 * LENGTH * 2 * WIDTH * 4 * 3 / 4
    assert sent(found)["cp", "all-gather"] == DEPTH * of_keys
    assert sent(found)["cp", "reduce-scatter"] == DEPTH * of_keys
    gradients = 2 * 3 / 4 * 4 * found.parameters
    assert sent(found)["cp", "all-reduce"] == pytest.approx(gradients, rel=0.01)
    assert found.by_category["activations"] < 0.5 * planned(1).by_category["activations"]


def test_slices_are_gathered_twice_and_summed_once() -> None:
    found = planned(4, "parallel=hsdp", "memory.microbatch=1")
    of_slices = 4 * found.parameters / 2  # two slices
    blocks = 4 * (found.parameters - VOCAB * WIDTH) / 2
    assert sent(found)["dp_shard", "reduce-scatter"] == pytest.approx(of_slices, rel=0.01)
    gathered = sent(found)["dp_shard", "all-gather"]
    assert 2 * (2 * blocks) < gathered < 2 * (2 * of_slices) * 1.01  # of two microbatches; the root stays between
    assert sent(found)["dp_replicate", "all-reduce"] == pytest.approx(2 / 2 * of_slices, rel=0.01)


def test_stages_send_hidden_states_on_and_gradients_back() -> None:
    found = planned(2, "parallel=pp", "memory.microbatch=1", "data.batch=8")
    assert sent(found)["pp", "send"] == 8 * LENGTH * WIDTH * 4
    assert found.microbatch == 1
    assert found.bubble == pytest.approx(1 / 9)
    assert not found.evaluated
    stage = DEPTH // 2 * (planned(1).parameters - VOCAB * WIDTH) / DEPTH + VOCAB * WIDTH
    assert found.by_category["parameters"] == pytest.approx(4 * stage, rel=0.03)


def test_more_microbatches_than_are_traced_take_no_more_memory_and_more_time() -> None:
    few, many = (planned(2, "parallel=pp", "memory.microbatch=1", f"data.batch={n}") for n in (4, 16))
    rows = 12 * 4 * LENGTH * 8  # of the batch itself
    assert few.peaks["training"] <= many.peaks["training"] <= few.peaks["training"] + rows
    busy = [p.step_s * (1 - p.bubble) for p in (few, many)]
    assert 3 < busy[1] / busy[0] <= 4
    assert sent(many)["pp", "send"] == 4 * sent(few)["pp", "send"]


def test_a_first_stage_keeps_as_many_microbatches_as_there_are_stages() -> None:
    shape = ["memory.microbatch=1", "data.batch=16", "data.length=128", "model.context=128"]
    two, four = (planned(n, "parallel=pp", f"model.depth={2 * n}", *shape) for n in (2, 4))
    assert four.by_category["activations"] == pytest.approx(2 * two.by_category["activations"], rel=0.1)
    every = planned(2, "parallel=pp", "parallel.schedule=gpipe", "model.depth=4", *shape)
    assert every.by_category["activations"] > 4 * two.by_category["activations"]


def test_thousands_of_ranks_in_every_way_at_once() -> None:
    shape = ["model.depth=6", "data.batch=256", "data.length=64", "memory.microbatch=1"]
    mesh = ["parallel=fsdp", "parallel.dp_replicate=4", "parallel.tp=4", "parallel.cp=4", "parallel.pp=2"]
    found = planned(4096, *shape, *mesh)
    assert found.sizes == Sizes(pp=2, dp_replicate=4, dp_shard=32, cp=4, tp=4)
    assert {t.axes for t in found.talk} >= {"pp", "tp", "cp", "dp_replicate", "dp_shard × cp"}
    assert sum(found.by_category.values()) == found.peaks["training"]


def test_a_model_that_begins_without_memory_takes_none_of_the_hosts() -> None:
    found = planned(8, "parallel=fsdp", "model.width=256", "checkpoint.asynchronous=false")
    assert found.host_bytes < 4 * found.parameters / 2


def test_who_takes_most_is_looked_at() -> None:
    sizes = Sizes(pp=2, dp_shard=2, cp=2, tp=2)
    assert looked_at(sizes) == [2, 10]
    assert [sizes.at(r)["cp"] for r in looked_at(sizes)] == [1, 1]
    assert [sizes.at(r)["pp"] for r in looked_at(sizes)] == [0, 1]
    assert looked_at(Sizes(dp_shard=512)) == [0]


@pytest.mark.parametrize(("axes", "waited"), [("tp", True), ("cp", True), ("dp_shard", False), ("pp", False)])
def test_who_shares_layers_or_positions_is_waited_for(axes: str, waited: bool) -> None:
    assert Line(axes, 2, 2).waited_for is waited


def test_where_ranks_are() -> None:
    sizes = Sizes(pp=2, dp_replicate=2, dp_shard=4, tp=4)
    line = of_ranks(range(4), sizes)
    assert (line.axes, line.size, line.near, line.machines) == ("tp", 4, 4, 1)
    line = of_ranks(range(0, 16, 4), sizes)
    assert (line.axes, line.size, line.near, line.machines) == ("dp_shard", 4, 2, 2)
    line = of_ranks([0, 32], sizes)
    assert (line.axes, line.near, line.machines) == ("pp", 1, 2)
    assert of_ranks(range(0, 32, 4), sizes).axes == "dp_replicate × dp_shard"


def test_a_mesh_is_said_so_that_it_is_the_same() -> None:
    run = runs.composed([*SMALL, "data.batch=16", "model.mlp.hidden=128"])
    known = list(meshes(run, 16))
    assert len(known) == len({tuple(w) for w, _ in known}) > 20
    for said, made in known:
        sizes = made.parallel.sizes(16, 2)
        assert words(sizes) == said
        assert runs.composed([*SMALL, "data.batch=16", "model.mlp.hidden=128", *said]).parallel == made.parallel


@pytest.mark.parametrize(
    "mesh",
    [
        ["parallel=ddp"],
        ["parallel=fsdp", "parallel.tp=2", "memory=checkpoint"],
        ["parallel=fsdp", "parallel.cp=2"],
        ["parallel=pp", "parallel.pp=2", "parallel.dp_replicate=4", "memory.microbatch=1"],
    ],
    ids=" ".join,
)
def test_no_plan_is_below_the_bound(mesh: list[str]) -> None:
    run, setting = runs.composed([*SMALL, "data.batch=16", *mesh]), Setting(H100, 8)
    found, sizes = plan(run, setting), planning.mesh_of(run, setting)
    assert bounds.least_bytes(run, setting) <= found.peaks["training"]
    assert bounds.row_bytes(run) / (sizes.tp * sizes.cp) <= found.peaks["training"]
    assert bounds.least_seconds(run, setting) <= found.step_s


def test_a_mesh_that_nobody_chose_is_chosen() -> None:
    assert planned(16, "parallel=auto", "data.batch=8").sizes == Sizes(dp_replicate=8, tp=2)
    with pytest.raises(UserError, match="parallel=auto finds no mesh"):
        planned(3, "parallel=auto", "data.batch=8", "data.length=31", "model.attention.heads=1")


@pytest.mark.parametrize(("schedule", "idle"), [("1f1b", 3 / 11), ("interleaved", 1.5 / 9.5), ("zbv", 0.0)])
def test_how_long_a_pipeline_stands_still(schedule: str, idle: float) -> None:
    given = [*SMALL, "parallel=pp", f"parallel.schedule={schedule}", "memory.microbatch=1", "model.depth=8"]
    assert planning.bubble(runs.composed(given), Sizes(pp=4)) == pytest.approx(idle)


CELLS = [
    "model=tiny data.batch=8 parallel=fsdp",
    "model=tiny data.batch=8 parallel=fsdp memory=checkpoint memory.microbatch=2",
    "model=tiny data.batch=8 parallel=ddp",
    "model=tiny data.batch=8 parallel=tp",
    "model=tiny data.batch=8 parallel=cp",
    "model=tiny data.batch=8 parallel=pp memory.microbatch=2",
]


def ranks_measure() -> None:
    joined = Parallel(kind="ddp", device="cpu").join(bench.CPU)
    found: list[dict[str, Any]] = []
    for cell in CELLS:  # the least of three: gloo's threads free their copies when they get to it, which only ever adds
        tries = [bench.measured(cell, joined) for _ in range(3)]
        found.append({phase: min(one[phase] for one in tries) for phase in tries[0]})
    Path(f"found-{joined.rank}").write_text(json.dumps(found))
    joined.leave()


def test_peaks_are_those_of_real_ranks(place: Path) -> None:
    bench.write_corpus(Path("corpus"), one_document=False)
    in_ranks(2, ranks_measure)
    both = [json.loads(Path(f"found-{rank}").read_text()) for rank in range(2)]
    for number, cell in enumerate(CELLS):
        said = bench.predicted(2, cell)
        training, evaluation = (max(found[number][phase] for found in both) for phase in ("training", "evaluation"))
        assert said["training"] / training == pytest.approx(1.0, abs=0.05), cell
        assert said["evaluation"] <= 1.05 * evaluation, cell
