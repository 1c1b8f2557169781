"""Being stopped at any moment: while preparing, compiling, evaluating, saving; and the scripts that start again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.rank_server import Server
from tests.ranks import free_port
from trainkit import launch, logs
from trainkit.checkpoint import find, load
from trainkit.signals import Signals, StopNow

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRAINKIT": f"{Path(sys.executable).parent}/trainkit"}
BUSY = [
    *SMALL,
    "evaluation.every=3",
    "evaluation.sample_tokens=20",
    "checkpoint.every=2",
    "steps=30",
    "model.dropout=0.1",
]


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
        if process.stdout and not process.stdout.closed:
            process.communicate()


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    STARTED.append(process)
    return process


def code_of(*command: str) -> int:
    process = start(*command)
    process.communicate()
    return process.returncode


def final(name: str) -> dict[str, torch.Tensor]:
    return load(find.resolve(name, Path("runs"), launch.policy)).tensors


def same(name: str, other: str) -> bool:
    ours, theirs = final(name), final(other)
    return all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def loaded(process: subprocess.Popen[str]) -> None:
    """Wait until Python has come as far as trainkit's own handlers."""
    caught = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        if int(lines["SigCgt"], 16) & caught:
            return
        time.sleep(0.005)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("how", "most"),
    [([], 6), (["compile=full", "evaluation.sample_tokens=0", "evaluation.every=15", "model.depth=1"], 3)],
    ids=["eager", "compiled"],
)
def test_a_stop_at_any_moment_is_a_clean_one(how: list[str], most: int, server: Server) -> None:
    draw = random.Random(0)
    forked, real = [str(server.program)], [sys.executable, "-m", "trainkit"]
    begin = time.monotonic()
    assert code_of(*forked, "train", *BUSY, *how, "name=whole") == 0
    seconds, stops = time.monotonic() - begin, 0
    while True:
        program = real if stops < 2 else forked  # the first two in the middle of imports, most likely
        run = start(*program, "train", *BUSY, *how, "name=stopped")
        loaded(run)
        try:
            out, _ = run.communicate(timeout=draw.uniform(0, 0.8) * seconds if stops < most else None)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGTERM)
            out, _ = run.communicate(timeout=60)
        assert run.returncode in (0, 75), out
        if run.returncode == 75:
            stops += 1
        elif stops > 1:
            break
        else:  # it was faster than its stopper: once more from the start
            shutil.rmtree("runs/stopped")
            seconds *= 0.7
    lines = [json.loads(line) for line in Path("runs/stopped/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert same("stopped", "whole")


def test_a_stop_of_which_others_make_an_error_is_still_a_stop() -> None:
    """A compiler in the middle of its work, or a callback from C."""
    with pytest.raises(StopNow, match="stopped by SIGTERM before the first step") as found:
        compile_under(Signals(), immediate=True)
    assert found.value.exit_code == 75
    with pytest.raises(RuntimeError, match="the backend failed"):
        compile_under(Signals(lambda note: None), immediate=False)  # from the first step on it is the loop that stops


def compile_under(signals: Signals, *, immediate: bool) -> None:
    with signals:
        signals.immediate = immediate
        try:
            signal.raise_signal(signal.SIGTERM)
        except StopNow as error:
            raise RuntimeError("the backend failed") from error
        raise RuntimeError("the backend failed")


@pytest.mark.parametrize("module", ["torch._dynamo.convert_frame", "torch._inductor.graph", "torch.nn.modules"])
def test_a_stop_while_torch_compiles_passes_no_native_code(module: str) -> None:
    """Which aborts at an exception that it did not expect. Anywhere else things are put in order on the way out."""
    code = f"""
import signal
from trainkit.signals import Signals
pretended = compile("signal.raise_signal(signal.SIGTERM)", "compiler", "exec")
try:
    with Signals():
        exec(pretended, {{"__name__": {module!r}, "signal": signal}})
except BaseException as error:
    print("on the way out", type(error).__name__, error)
    raise SystemExit(75)
"""
    process = start(sys.executable, "-c", code)
    out, _ = process.communicate(timeout=60)
    line = "stopped by SIGTERM before the first step: nothing is lost"
    assert process.returncode == 75
    assert out == (f"on the way out StopNow {line}\n" if module == "torch.nn.modules" else f"trainkit: {line}\n")


@pytest.mark.timeout(600)
def test_a_stop_while_python_takes_itself_down_changes_nothing() -> None:
    code = """
import signal
from trainkit.signals import leave_at_once
class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
slow = Slow()
leave_at_once()
"""
    assert code_of(sys.executable, "-c", code) == 0


def test_the_spot_loop_goes_on_after_kills_and_stops_when_asked(server: Server) -> None:
    what = [*SMALL, "steps=3000", "checkpoint.every=20", "name=s", "evaluation=end"]
    loop = start(str(ROOT / "scripts/spot_loop.sh"), *what, WAIT_S="0.1", TRAINKIT=str(server.program))
    checkpoints = Path("runs/s/checkpoints")

    def newest() -> int:
        return max((int(p.name[5:]) for p in checkpoints.glob("step-*")), default=0) if checkpoints.exists() else 0

    def holder() -> int:
        lock = Path("runs/s/LOCK")
        return int(json.loads(lock.read_text() or '{"pid": 0}')["pid"]) if lock.exists() else 0

    def comes_further(before: int, step: int) -> tuple[int, int]:
        """Another process than `before` has the run, and has saved beyond `step`: its pid, and where it is."""
        while holder() == before or newest() <= step:
            time.sleep(0.05)
            assert loop.poll() is None
        return holder(), newest()

    pid, step = 0, 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        pid, step = comes_further(pid, step)
        os.kill(pid, number)
    comes_further(pid, step)
    loop.send_signal(signal.SIGTERM)
    out = loop.communicate(timeout=60)[0]
    assert loop.returncode == 75, out
    assert out.count("starting it again") == 3, out
    assert code_of(str(ROOT / "scripts/spot_loop.sh"), "model=nothing") == 2


@pytest.mark.timeout(600)
def test_the_slurm_job_requeues_itself(tmp_path: Path, server: Server) -> None:
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    (fake / "scontrol").chmod(0o755)
    path = f"{fake}:{os.environ['PATH']}"
    what = [*SMALL, "steps=3000", "checkpoint.every=20", "name=s", "evaluation=end"]
    job = start(str(ROOT / "scripts/slurm.sbatch"), *what, PATH=path, SLURM_JOB_ID="7", TRAINKIT=str(server.program))
    while not list(Path("runs").glob("s/checkpoints/step-*")):
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)  # as --signal=B:TERM@120 sends it
    out = job.communicate(timeout=60)[0]
    assert job.returncode == 0, out
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    held = final("s")
    assert held


@pytest.mark.timeout(600)
def test_ranks_of_a_stopped_rank_do_not_wait_for_ever(server: Server) -> None:
    port = free_port()
    what = [*SMALL, "parallel=ddp", "steps=100000", "name=h", "evaluation=end", "checkpoint.every=50", "guard.hang_s=8"]
    ranks = [
        start(
            *[str(server.program), "train", *what],
            RANK=str(r),
            WORLD_SIZE="2",
            LOCAL_RANK=str(r),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
        for r in range(2)
    ]
    while not list(Path("runs").glob("h/checkpoints/step-*")):
        time.sleep(0.05)
        assert ranks[0].poll() is None
    second = int(logs.path(Path("runs/h"), 1).read_text().split(", process ")[-1].split()[0])
    os.kill(second, signal.SIGSTOP)
    begin = time.monotonic()
    out = ranks[0].communicate(timeout=90)[0]
    assert time.monotonic() - begin < 40
    assert ranks[0].returncode == 1
    assert "is taken for hung, and rank 1 does not answer any more: stacks of its threads are in" in out
    assert "trainer.py" in Path("runs/h/stacks-rank-0.txt").read_text()  # where it waits
