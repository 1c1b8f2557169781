"""The smaller rooms: precision, evaluation, memory strategies, signals, throughput, random generators."""

import http.server
import math
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import weights
from trainkit import hardware, randomness
from trainkit import signals as signals_room
from trainkit.errors import UserError
from trainkit.evaluation import Evaluation
from trainkit.learner import Learner
from trainkit.precision import Precision
from trainkit.signals import Signals, StopNow, announced
from trainkit.throughput import Meter
from trainkit.units import human_bytes, human_count, human_time


def test_low_precision_computes_low_and_learns_high(learner: Callable[..., Learner]) -> None:
    seen = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        it = learner(f"precision={name}", "compile=off")
        block = it.model.backbone.blocks[0]  # type: ignore[union-attr, index]
        block.mlp.into.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        loss = float(it.train_step()["loss"])
        assert set(seen) == {dtype}
        assert {p.dtype for p in it.parameters} == {torch.float32}
        assert loss == pytest.approx(float(learner().train_step()["loss"]), rel=5e-3)
        seen.clear()
    assert {p.dtype for p in learner("precision=fp64").parameters} == {torch.float64}


def test_tf32_is_set_both_ways() -> None:
    module, cpu = torch.nn.Linear(1, 1), torch.device("cpu")
    Precision(tf32=True).apply(module, cpu)
    assert torch.get_float32_matmul_precision() == "high"
    Precision().apply(module, cpu)
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ValueError, match="float64 computes in float64"):
        Precision(params="float64", compute="bfloat16")


@pytest.mark.parametrize("how", ["blocks", "full"])
def test_compiled_learns_the_same(learner: Callable[..., Learner], how: str) -> None:
    plain, compiled = learner(), learner(f"compile={how}")
    for _ in range(2):
        plain.train_step()
        compiled.train_step()
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-3, atol=1e-5)
    assert compiled.tensors().keys() == plain.tensors().keys()


def test_checkpointing_really_runs_blocks_again(learner: Callable[..., Learner]) -> None:
    for memory, calls in (("baseline", [1, 1, 1, 1]), ("checkpoint", [2, 2, 2, 2])):
        it = learner(f"memory={memory}", "model.depth=4")
        counts = [0] * 4
        for i, block in enumerate(it.model.backbone.blocks):  # type: ignore[union-attr, arg-type]

            def count(module: object, args: object, i: int = i, counts: list[int] = counts) -> None:
                counts[i] += 1

            block.attention.register_forward_pre_hook(count)
        it.train_step()
        assert counts == calls


@pytest.mark.parametrize("higher", [False, True])
def test_the_best_so_far(higher: bool) -> None:
    sign = -1 if higher else 1
    cfg = Evaluation(every=10, patience=2, min_delta=0.1, higher_is_better=higher)
    best = cfg.best()
    assert best.update(1, math.nan) is False
    assert best.update(2, sign * 3.0)
    assert not best.update(3, sign * 2.95)  # not by enough
    assert not best.exhausted(2)
    again = cfg.best()
    again.load_state_dict(best.state_dict())
    for it in (best, again):
        assert not it.update(4, math.nan)
        assert it.exhausted(2)
        assert not it.exhausted(None)
        assert it.update(5, sign * 2.0)
        assert (it.value, it.step, it.stale) == (sign * 2.0, 5, 0)
    assert [s for s in range(1, 31) if cfg.due(s)] == [10, 20, 30]
    assert not Evaluation(every=0).due(10)


def test_signals_ask_first_and_interrupt_next() -> None:
    notes: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with Signals(notes.append) as signals:
        signals.immediate = False
        signal.raise_signal(signal.SIGUSR1)
        assert signals.save_asked
        assert signals.asked is None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert signals.asked == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # a supervisor that repeats itself
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: saving, then leaving" in notes[0]


def test_a_signal_before_the_first_step_leaves_at_once() -> None:
    with (
        Signals() as signals,
        pytest.raises(StopNow, match="stopped by SIGTERM before the first step: nothing is lost"),
    ):
        signal.raise_signal(signal.SIGTERM)
    assert StopNow.exit_code == 75
    assert signals.asked == "SIGTERM"


def test_a_notice_is_a_file_or_an_address_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/soon" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert announced(f"{at}/soon")
        assert not announced(f"{at}/never")
        server.shutdown()
    assert not announced(f"{at}/soon")  # nobody there is no notice
    assert not announced("gone")
    monkeypatch.setattr(signals_room, "POLL_S", 0.01)
    with Signals(lambda note: None, notice="gone") as signals:
        signals.immediate = False
        Path("gone").touch()
        time.sleep(0.3)
    assert signals.asked == "SIGTERM"


def test_rates_leave_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(tokens_per_step=50, flops_per_token=4.0, peak_flops=1000.0)
    meter.start(10)
    now[0] += 2
    with meter.pause():
        now[0] += 30
    now[0] += 2
    found = meter.read(18, 20)
    assert found == {"tokens": 900, "tokens_per_s": 100.0, "mfu": 0.4, "time": 4.0, "eta_s": 1.0}
    now[0] += 1
    assert meter.read(19, 20)["tokens_per_s"] == 50.0
    assert meter.seconds == 5.0


def test_random_generators_go_on_where_they_were() -> None:
    random.gauss(0, 1)
    np.random.standard_normal(1)
    kept = randomness.state()
    drawn = [(random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) for _ in range(3)]
    randomness.seed_all(5)
    randomness.load(kept)
    assert drawn == [
        (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) for _ in range(3)
    ]
    assert len({randomness.mix(*n) for n in [(0, 1), (1, 0), (0, 1, 0), (10,), (1, 0, 0)]}) == 5


def test_numbers_as_people_read_them() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40, 5 << 52)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "5.0 TiB",
        "20480.0 TiB",
    ]
    assert [human_count(n) for n in (7, 1500, 124_439_808, 7e9)] == ["7", "1.5K", "124.4M", "7.0B"]
    assert [human_time(s) for s in (5, 65, 3725, 90_000)] == ["5s", "1m05s", "1h02m", "1d01h"]


def test_devices() -> None:
    assert hardware.choose("cpu") == torch.device("cpu")
    assert hardware.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    held = hardware.memory_in_use(torch.device("cpu"))
    with mmap.mmap(-1, 40 << 20) as ballast:  # not of what malloc keeps from before
        for _ in range(40):
            ballast.write(b"1" * (1 << 20))
        assert hardware.memory_in_use(torch.device("cpu")) - held > 30 << 20
    with pytest.raises(UserError, match="there is cpu"):
        hardware.choose("gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_learns_what_a_cpu_learns(learner: Callable[..., Learner]) -> None:
    there, here = learner("optimizer=sgd"), learner("optimizer=sgd", "parallel.device=cpu")
    for _ in range(3):
        loss = float(there.train_step()["loss"])
        assert loss == pytest.approx(float(here.train_step()["loss"]), rel=1e-4)
