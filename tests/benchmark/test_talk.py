"""What ranks say to each other: counted, timed, and shown."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from tests.benchmark.made_up import found, made_up
from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build
from trainkit import run as runs
from trainkit.benchmark import talk, words
from trainkit.benchmark.rounds import Settings
from trainkit.benchmark.sweep import experiment
from trainkit.benchmark.verb import _shared


def event(name: str, begin: float, end: float, thread: int = 1, device: DeviceType = DeviceType.CPU) -> Any:
    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(name=name, thread=thread, device_type=device, time_range=span)


def test_spans_that_touch_are_one() -> None:
    assert talk.union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert talk.length([(0, 4), (5, 6)]) == 5


def test_exposed_is_what_goes_on_beside_nothing() -> None:
    assert talk.exposed([(0, 10), (8, 12)], [(2, 5), (11, 20)]) == 12 - 3 - 1
    assert talk.exposed([(0, 10)], []) == 10
    assert talk.exposed([(1, 2)], [(0, 3)]) == 0


def test_on_a_cpu_gloos_threads_do_not_compute() -> None:
    events = [
        event("aten::mm", 0, 4),
        event("c10d::allreduce_", 4, 5),
        event("gloo:all_reduce", 5, 9, thread=2),
        event("aten::copy_", 6, 8, thread=2),
    ]
    assert talk.spans(events) == ([(5, 9)], [(0, 4)])


def test_on_a_gpu_it_is_kernels_that_count() -> None:
    gpu = DeviceType.CUDA
    events = [
        event("aten::mm", 0, 9),
        event("sm90_gemm", 1, 4, device=gpu),
        event("ncclDevKernel_AllGather_RING_LL", 3, 6, device=gpu),
    ]
    assert talk.spans(events) == ([(3, 6)], [(1, 4)])


def test_efficiency_is_by_rank_and_against_the_first() -> None:
    step = {"seconds": 0.2, "talked_s": 0.05, "exposed_s": 0.01}
    said = {**step, "sent": [{"axes": "dp_replicate", "collective": "all-reduce", "bytes": 3 << 20}]}
    single, ddp = made_up([found(2.0)], [found(1.25, ranks=2, talk=said)])["cells"]
    assert single["efficiency"] is None
    assert ddp["efficiency"] == pytest.approx(0.8)
    assert words.talk(single) is None
    assert words.talk(ddp) == ("2", "80.0%", "3.0 MiB", "50 ms".replace(" ", words.SPACE), "80%", "5%")


def test_cells_that_share_get_ranks_and_no_more_threads_than_one_alone() -> None:
    cells = experiment(["parallel=single,ddp", "parallel.device=cpu"]).cells
    settings = _shared(cells, Settings(), None)
    assert settings.ranks == 2
    assert settings.threads
    assert settings.threads >= 1
    assert _shared(cells, Settings(), 3).ranks == 3
    assert _shared(cells[:1], Settings(), None) == Settings()


WORDS = [*SMALL, "data.batch=4", "parallel.device=cpu", "memory.microbatch=1"]
WAYS = ["parallel=ddp", "parallel=fsdp", "parallel=tp", "parallel=cp"]


def followed() -> None:
    """On two ranks: a step of every way, written down."""
    joined = None
    for way in WAYS:
        run = runs.composed([*WORDS, way])
        joined = joined or run.parallel.join(torch.device("cpu"))
        it = build.learner(run, run.data.open(), run.parallel.lay_out(joined))
        it.train_step()
        Path(f"{way}-{joined.rank}.json").write_text(json.dumps(talk.measured(it)))
    assert joined is not None
    joined.leave()


def test_what_a_real_step_sends_is_what_a_plan_says(place: Path) -> None:
    from trainkit.plan.cards import CARDS
    from trainkit.plan.planned import Setting, plan

    in_ranks(2, followed)
    for way in WAYS:
        said = {
            (t.axes, t.collective): t.sent for t in plan(runs.composed([*WORDS, way]), Setting(CARDS["h100"], 2)).talk
        }
        for rank in range(2):
            step = json.loads(Path(f"{way}-{rank}.json").read_text())
            seen = {(one["axes"], one["collective"]): one["bytes"] for one in step["sent"]}
            large = {key for key in seen.keys() | said.keys() if max(seen.get(key, 0), said.get(key, 0)) > 1000}
            assert large
            for key in large:
                assert seen.get(key, 0) == pytest.approx(said.get(key, 0), rel=0.01), (way, key)
            assert 0 <= step["exposed_s"] <= step["talked_s"] <= step["seconds"]
