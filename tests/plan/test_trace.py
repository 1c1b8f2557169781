"""What a plan says against what torch's allocator hands out, against arithmetic, and against itself."""

from pathlib import Path

import pytest
import torch

from benchmarks import plan as bench
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.plan import planned as planning
from trainkit.plan.cards import CARDS, Card
from trainkit.plan.depth import of_depth
from trainkit.plan.kernels import Device, Work
from trainkit.plan.live import CATEGORIES, Live
from trainkit.plan.planned import Plan, Setting, plan
from trainkit.plan.trace import Numbers, trace
from trainkit.plan.world import Line

CPU = bench.NO_SPEED
H100 = CARDS["h100"]
SMALL = ["model.width=64", "model.attention.heads=2", "model.vocab=512", "data.length=64", "evaluation.sample_tokens=8"]


def planned(*overrides: str, card: Card = CPU, ranks: int = 1, documents: bool = True, whole: bool = False) -> Plan:
    run = runs.composed([*SMALL, *overrides, "name=t"])
    return plan(run, Setting(card, ranks, documents=documents), whole=whole)


def traced(*overrides: str, device: Device, depth: int | None = None, documents: bool = True) -> Numbers:
    run = runs.composed([*SMALL, *overrides, "name=t"])
    return trace(run, device, lambda work: sum(w.bytes for w in work) / 1e9, documents=documents, depth=depth)


@pytest.mark.parametrize(
    "cell",
    [
        ["model=tiny", "data.batch=8", "precision=bf16", "memory.microbatch=3", "model.vocab=20000"],
        ["model=tiny", "data.batch=1", "data.length=32", "memory=checkpoint", "model.vocab=20000", bench.ONE],
        ["model=tiny", "data.batch=8", "memory=checkpoint+8bit", "memory.microbatch=1", "model.vocab=20000"],
        ["model=tiny", "data.batch=8", "memory=checkpoint+stream", "precision=bf16", "memory.microbatch=4"],
        ["model=tiny", "data.batch=8", "model.dropout=0.1", "optimizer=muon", "memory=offload_activations"],
        ["model=gpt2", "model.width=96", "model.depth=3", "data.batch=4", "precision=bf16", "optimizer=sgd"],
    ],
    ids=" ".join,
)
def test_peaks_are_those_of_the_allocator(cell: list[str], place: Path) -> None:
    said, found = bench.predicted(cell, whole=True), bench.measured(cell)
    # a small evaluation in bf16 is 1.3 % off, and we do not know of what
    near = 0.02 if "precision=bf16" in cell else 0.01
    assert {name: said[name] / found[name] for name in found} == pytest.approx(dict.fromkeys(found, 1.0), abs=near)


@pytest.mark.parametrize("how", ["memory=baseline", "memory=checkpoint+offload_activations"])
@pytest.mark.parametrize("card", [CPU, H100], ids=["cpu", "h100"])
def test_a_few_blocks_say_it_of_all(how: str, card: Card) -> None:
    few, every = (planned("model.depth=13", how, card=card, whole=whole) for whole in (False, True))
    assert few.depths == (3, 4, 5)
    assert every.depths == (13,)
    assert (few.peaks, few.by_category, few.host_bytes) == (every.peaks, every.by_category, every.host_bytes)
    assert few.step_s == pytest.approx(every.step_s, rel=0.01)


def test_a_strategy_of_every_second_block_is_seen_to_be_one() -> None:
    def of(depth: int) -> Numbers:
        return {("peak", "forward", "inner", "total"): 10.0 * depth + 7 * (depth % 2)}

    numbers, depths = of_depth(21, of)
    assert depths == [3, 4, 5, 7]
    assert numbers == of(21)


def test_what_is_linear_in_nothing_is_traced_whole() -> None:
    numbers, depths = of_depth(40, lambda depth: {("peak", "forward", "inner", "total"): float(depth**3)})
    assert depths == [40]
    assert numbers["peak", "forward", "inner", "total"] == 64_000


def test_flops_are_those_of_the_formula() -> None:
    run = runs.composed([*SMALL, "model.depth=3", "data.batch=4", "memory.microbatch=1", "name=t"])
    numbers = traced("model.depth=3", "data.batch=4", "memory.microbatch=1", device=CPU.device(), documents=False)
    counted = sum(numbers["flops", phase] for phase in ("forward", "backward", "update"))
    # of attention's backward the formula has four products where the kernel makes five
    assert counted == pytest.approx(run.model.flops_per_token(64) * 4 * 64, rel=0.02)


def test_checkpointing_runs_the_forward_again() -> None:
    once, again = (
        traced("model.depth=4", how, device=CPU.device()) for how in ("memory=baseline", "memory=checkpoint")
    )
    tokens = 16 * 64
    head = 2 * tokens * 64 * 512
    last = 4 * 2 * tokens * 256 * 64  # a block's last product is not made again: nothing asks for its result
    assert again["flops", "forward"] == once["flops", "forward"]
    assert again["flops", "backward"] - once["flops", "backward"] == once["flops", "forward"] - head - last


def test_work_counts_every_microbatch_and_one_update() -> None:
    ways = ["memory.microbatch=1", "memory.microbatch=2", "memory.microbatch=8", "memory.microbatch=null"]
    each = [traced("data.batch=8", "model.depth=2", way, device=CPU.device()) for way in ways]
    for phase in ("forward", "backward", "update"):
        assert len({round(n["flops", phase]) for n in each}) == 1
    assert each[0]["seconds", "update"] == pytest.approx(each[2]["seconds", "update"], rel=0.01)


def test_activations_that_are_offloaded_lie_on_the_host() -> None:
    small = "memory.offload_activations.above_mb=0.001"
    ways = (["memory=baseline"], ["memory=offload_activations", small])
    (few, away_few), (many, away_many) = (
        [planned(f"model.depth={depth}", "data.batch=8", *how, card=H100) for how in ways] for depth in (4, 8)
    )
    of_blocks = many.peaks["training"] - few.peaks["training"]  # of four more, with their parameters and states
    parameters = 4 * (many.parameters - few.parameters)
    gradients_too = (
        away_many.peaks["training"] - away_few.peaks["training"]
    )  # which are there when the peak is at the end
    assert gradients_too == pytest.approx(4 * parameters, rel=0.05)
    moved = (away_many.moved_bytes - away_few.moved_bytes) / 2  # there and back
    assert moved == pytest.approx(of_blocks - 3 * parameters, rel=0.15)
    saved = away_many.peaks["saving"]  # a checkpoint's copy, which the host has as well
    assert away_many.host_bytes - saved == pytest.approx(away_many.moved_bytes / 2, rel=0.01)


def test_what_cannot_be_traced_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*args: object, **kwargs: object) -> Numbers:
        raise RuntimeError("aten.some_op was not found\nand more")

    monkeypatch.setattr(planning, "trace", raising)
    with pytest.raises(
        UserError, match=r"^checkpoint \(exact\).* without being run \(aten.some_op was not found\): plan"
    ):
        planned("memory=checkpoint")


def test_replicas_send_their_gradients_once() -> None:
    found = planned("model.depth=2", "parallel=ddp", "data.batch=16", "memory.microbatch=1", card=H100, ranks=4)
    assert found.sent_bytes == pytest.approx(2 * 3 / 4 * 4 * found.parameters, rel=0.01)
    alone = planned("model.depth=2", "data.batch=4", "memory.microbatch=1", card=H100)
    assert found.checkpoint_bytes == pytest.approx(alone.checkpoint_bytes / 4, rel=0.01)


def test_of_a_sharded_model_a_rank_of_256_holds_its_slice() -> None:
    overrides = ["model.depth=3", "model.width=512", "data.batch=256", "parallel=fsdp"]
    found = planned(*overrides, card=H100, ranks=256)
    slices = 16 * found.parameters / 256  # parameters, gradients and two moments
    assert found.checkpoint_bytes == pytest.approx(slices * 3 / 4, rel=0.05)
    deeper = planned(*overrides, "model.depth=6", card=H100, ranks=256)
    states = 16 * (deeper.parameters - found.parameters)  # of three more blocks, on all ranks together
    assert 0 < deeper.peaks["training"] - found.peaks["training"] < 0.2 * states  # kept whole they would add a quarter
    assert found.sent_bytes > 2 * 4 * found.parameters


def test_categories_add_up_and_are_what_they_say() -> None:
    found = planned("model.depth=3", "data.batch=4", "memory.microbatch=1")
    assert set(found.by_category) == set(CATEGORIES)
    assert sum(found.by_category.values()) == found.peaks["training"]
    assert found.by_category["parameters"] == 4 * found.parameters
    assert found.by_category["optimizer"] == pytest.approx(8 * found.parameters, rel=0.001)
    assert found.by_category["gradients"] <= 4 * found.parameters


def test_a_gpu_hands_memory_out_in_pieces_and_fuses_norms() -> None:
    on_gpu, on_cpu = (planned("model.depth=3", "data.batch=4", card=card) for card in (H100, CPU))
    assert on_gpu.by_category["parameters"] % 512 == 0
    normed = 6 * 4 * 64 * 64 * 4  # what two norms a block keep on a CPU beside their input
    assert on_gpu.by_category["activations"] < on_cpu.by_category["activations"] - 0.9 * normed


def test_dropout_in_attention_is_fused_on_a_gpu() -> None:
    without, with_dropout = (
        planned("model.depth=3", "data.length=256", f"model.dropout={p}", card=H100, documents=False).peaks["training"]
        for p in (0.0, 0.1)
    )
    scores = 16 * 2 * 256 * 256 * 4  # of one block
    assert with_dropout < without + 2 * scores


def test_storages_are_followed_when_they_are_resized() -> None:
    with Live(Device(torch.device("cpu"))) as live:
        x = torch.zeros(100, dtype=torch.float64)
        assert sum(live.held.values()) == 800
        x.untyped_storage().resize_(0)
        assert sum(live.held.values()) == 0
        x.untyped_storage().resize_(1600)
        assert sum(live.held.values()) == 1600
        del x
        assert sum(live.held.values()) == 0
    assert max(p.bytes for p in live.peaks.values()) == 1600


def test_a_roofline_takes_the_slower_of_arithmetic_and_memory() -> None:
    card = Card("x", 24, 100, 100, 200, 50, 20, 1000, 10, 20)
    thick = Work(flops=65e12, dtype=torch.bfloat16, bytes=1)
    thin = Work(bytes=800_000_000_000)
    kernel = Work()
    assert card.seconds([thick], efficiency=0.65, tf32=False) == pytest.approx(1.0)
    assert card.seconds([thin, kernel], efficiency=0.65, tf32=False) == pytest.approx(1.000005)
    single = Work(flops=20e12, dtype=torch.float32)
    assert card.seconds([single], efficiency=1.0, tf32=False) == pytest.approx(1.0)
    assert card.seconds([single], efficiency=1.0, tf32=True) == pytest.approx(0.4)
    moved, beside = Work(moved=20_000_000_000), Work(moved=20_000_000_000, beside=True)
    assert card.seconds([thick, moved], efficiency=0.65, tf32=False) == pytest.approx(2.0, rel=1e-4)
    assert card.seconds([thick, beside], efficiency=0.65, tf32=False) == pytest.approx(1.0, rel=1e-4)
    near = Work(sent=24_000_000_000, line=Line("dp_shard", 4, 4))
    assert card.seconds([thick, near], efficiency=0.65, tf32=False) == pytest.approx(3.0)
    inside = Work(sent=24_000_000_000, line=Line("tp", 4, 4))
    assert card.seconds([thick, inside], efficiency=0.65, tf32=False) == pytest.approx(4.0)


def test_between_machines_every_rank_of_one_brings_its_adapter() -> None:
    card = CARDS["h100"]
    one, all_ = Line("dp_replicate", 4, 1), Line("dp_shard", 32, 8)
    assert card.talked(one, 40e9, 0) == pytest.approx(1.0)  # 50 GB/s at 80 %
    assert card.talked(all_, 320e9, 0) == pytest.approx(1.0)  # eight of them
    assert card.talked(Line("tp", 8, 8), 360e9, 0) == pytest.approx(1.0)
    assert card.talked(one, 0, 3) == pytest.approx(3 * 5e-6)
    assert card.talked(all_, 0, 32) == pytest.approx(4 * 5e-6 + 28 * 1e-6)
