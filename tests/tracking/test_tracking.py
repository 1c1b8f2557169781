"""Trackers: what they write, what they survive, and that a run survives them."""

import errno
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console as Terminal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainkit.errors import UserError
from trainkit.tracking import Trackers, Tracking
from trainkit.tracking.console import Console, PlainTracker, RichTracker
from trainkit.tracking.jsonl import Jsonl, JsonlTracker
from trainkit.tracking.mlflow import Mlflow
from trainkit.tracking.tensorboard import Tensorboard
from trainkit.tracking.wandb import Wandb

HEADER = {"run": "t", "model": "[bold]1M"}
METRICS = {"loss": 2.5, "lr": 1e-3, "tokens": 100.0, "tokens_per_s": 1500.0, "mfu": 0.4, "memory_gb": 0.5, "time": 1.0}
VALIDATION = {"val_loss": 2.25, "val_perplexity": 9.5, "val_bits_per_byte": 3.25}


def run(tracker: Any, begin: int, end: int, **other: float) -> Any:
    tracker.start(HEADER, begin, 10, "name: t\n")
    return run_on(tracker, begin, end, **other)


def run_on(tracker: Any, begin: int, end: int, **other: float) -> Any:
    for step in range(begin + 1, end + 1):
        tracker.log(step, METRICS | {"loss": 1.0 * step, "eta_s": 5.0} | other)
    return tracker


class Failing:
    def __init__(self, verb: str) -> None:
        self.told: list[str] = []
        self._verb = verb

    def __getattr__(self, verb: str) -> Any:
        def told(*args: Any) -> None:
            self.told.append(verb)
            if verb == self._verb:
                raise ConnectionError("gone")

        return told


@pytest.mark.parametrize("verb", ["start", "log", "text", "note", "close"])
def test_a_tracker_that_fails_is_left_out_and_said_once(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = Failing(verb), Failing("never")
    trackers = Trackers([bad, good])
    for _ in range(2):
        trackers.start({}, 0, steps=1, config="")
        trackers.log(1, {})
        trackers.text(1, "sample", "")
        trackers.note("")
        trackers.close("done")
    order = ["start", "log", "text", "note", "close"]
    assert good.told == order * 2
    assert bad.told == order[: order.index(verb) + 1]
    assert capsys.readouterr().err == "warning: Failing failed and is left out (ConnectionError: gone)\n"


def test_ctrl_c_is_no_failure_of_a_tracker() -> None:
    class Interrupted:
        def log(self, step: int, metrics: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).log(1, {})


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]


def test_jsonl_has_one_object_a_step() -> None:
    tracker = run(Jsonl().build(Path()), 0, 3, grad_norm=math.inf, x=1 / 3)
    tracker.close("done")
    assert [line["step"] for line in lines()] == [1, 2, 3]
    assert lines()[0]["grad_norm"] is None
    assert lines()[0]["x"] == 1 / 3
    assert set(lines()[0]) == {"step", *METRICS, "grad_norm", "x"}


def test_jsonl_is_cut_back_to_where_the_run_goes_on() -> None:
    run(Jsonl().build(Path()), 0, 7).close("x")
    with Path("metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')
    run(Jsonl().build(Path()), 4, 6).close("x")
    assert [line["step"] for line in lines()] == [1, 2, 3, 4, 5, 6]


def test_jsonl_waits_for_room_on_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, room = os.write, [10**6]

    def write(descriptor: int, data: bytes) -> int:
        took = min(len(data), room[0])
        if not took:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= took
        return real(descriptor, data[:took])

    monkeypatch.setattr(os, "write", write)
    tracker = run(Jsonl().build(Path()), 0, 3)
    room[0] = 20  # less than a line
    run_on(tracker, 3, 6)
    assert Path("metrics.jsonl").read_bytes().endswith(b"\n")
    assert [line["step"] for line in lines()] == [1, 2, 3]
    room[0] = 10**6
    tracker.note("saved step 6")
    assert [line["step"] for line in lines()] == [1, 2, 3, 4, 5, 6]
    room[0] = 0
    run_on(tracker, 6, 9)
    tracker.go_back(7)
    room[0] = 10**6
    run_on(tracker, 7, 9)
    assert [line["step"] for line in lines()] == list(range(1, 10))
    room[0] = 0
    tracker.go_back(4)  # takes no room
    assert [line["step"] for line in lines()] == [1, 2, 3, 4]
    tracker.close("done")
    assert capsys.readouterr().err.count("waits for room") == 1


def test_jsonl_survives_kills_without_a_doubled_step() -> None:
    code = (
        "import sys; from pathlib import Path; from trainkit.tracking.jsonl import Jsonl\n"
        "t = Jsonl().build(Path()); t.start({}, int(sys.argv[1]), 0, '')\n"
        "step = int(sys.argv[1])\n"
        "while True: step += 1; t.log(step, {'loss': 1.0, 'pad': 1e300})\n"
    )
    saved = 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(saved)])
        size = Path("metrics.jsonl").stat().st_size if Path("metrics.jsonl").exists() else 0
        while not Path("metrics.jsonl").exists() or Path("metrics.jsonl").stat().st_size < size + 50_000:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        saved += 500
    tracker = Jsonl().build(Path())
    tracker.start({}, saved, 0, "")
    tracker.close("")
    assert [line["step"] for line in lines()] == list(range(1, saved + 1))


def test_tensorboard_has_the_names_and_forgets_lost_steps() -> None:
    tracker = run(Tensorboard().build(Path()), 0, 6)
    tracker.log(6, METRICS | VALIDATION | {"grad_norm": 1.5, "val_other": 2.0})
    tracker.text(6, "sample", "some text\nmore")
    tracker.close("x")
    time.sleep(1.1)  # event files are told apart by the second
    again = run(Tensorboard().build(Path()), 4, 5, loss=40.0)
    again.close("x")
    events = EventAccumulator("tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    names = {
        "Loss/train",
        "Throughput/tokens_per_sec",
        "Memory/allocated_gb",
        "LR",
        "Throughput/mfu",
        "Progress/tokens",
    }
    assert names <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("Loss/train")] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 40)]
    assert {"Config/text_summary"} <= set(events.Tags()["tensors"])
    text = events.Tensors("Config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "name: t" in text


def test_tensorboard_has_what_was_logged_before_a_kill() -> None:
    tracker = run(Tensorboard().build(Path()), 0, 3)
    events = EventAccumulator("tensorboard")
    events.Reload()
    assert [e.step for e in events.Scalars("Loss/train")] == [1, 2, 3]
    tracker.close("x")


def test_tensorboard_keeps_validation_and_samples() -> None:
    tracker = run(Tensorboard().build(Path()), 0, 1)
    tracker.log(2, METRICS | VALIDATION | {"grad_norm": 1.5, "val_other": 2.0})
    tracker.text(2, "sample", "some text\nmore")
    tracker.close("x")
    events = EventAccumulator("tensorboard")
    events.Reload()
    found = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert found["Loss/val"] == 2.25
    assert (found["Perplexity/val"], found["BitsPerByte/val"], found["GradNorm"], found["other/val"]) == (
        9.5,
        3.25,
        1.5,
        2,
    )
    assert "more" in events.Tensors("Samples/text_summary")[0].tensor_proto.string_val[0].decode()


def shown(width: int, terminal: bool) -> str:
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=terminal, width=width, highlight=False)
    tracker = RichTracker(console) if terminal else PlainTracker(console)
    run(tracker, 2, 4, **VALIDATION)
    tracker.text(4, "sample", "\nCall me [b]Ishmael\n")
    tracker.note("warning: [x] is odd")
    tracker.close("done")
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_terminal_shows_what_matters_in_any_width(width: int) -> None:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(width, terminal=True))
    for words in ("trainkit", "[bold]1M", "4/10", "loss", "Call me [b]Ishmael", "[x] is odd", "validation loss 2.2500"):
        assert words in plain, (words, plain)
    assert max(len(line) for line in re.split(r"[\r\n]", plain)) <= width
    assert ("lr 1.00e-03" in plain) == (width >= 120)
    assert ("eta 5s" in plain) == (width >= 80)


def test_without_a_terminal_there_are_plain_lines() -> None:
    text = shown(40, terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "run: t\nmodel: [bold]1M\n" in text
    assert "step 4/10  loss 4.0000  tok/s 1.5K  eta 5s  mfu 40%  mem 0.50 GB  lr 1.00e-03\n" in text
    assert "step 4/10  validation loss 2.2500, perplexity 9.5000, bits per byte 3.2500\n" in text
    assert isinstance(Console().build(Path()), PlainTracker)


class FakeRun(SimpleNamespace):
    def log(self, metrics: Any, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self, exit_code: int) -> None:
        self.logged.append(exit_code)


def test_wandb_goes_on_in_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    fake = FakeRun(id="abc", logged=[])
    module.init = lambda **how: calls.append(how) or fake  # type: ignore[attr-defined]
    module.Html = lambda text: ("html", text)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for begin in (0, 2):
        tracker = run(Wandb(mode="offline").build(Path()), begin, begin + 1)
        tracker.text(begin + 1, "sample", "<b>")
        tracker.close("done")
    assert [call["id"] for call in calls] == [None, "abc"]
    assert calls[0]["config"]["run.yaml"] == "name: t\n"
    assert fake.logged[0][0] == 1
    assert fake.logged[1] == (1, {"sample": ("html", "<pre>&lt;b></pre>")})
    assert fake.logged[2] == 0


def test_mlflow_goes_on_in_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module = ModuleType("mlflow")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    for verb in ("set_tracking_uri", "set_experiment", "log_text", "log_metrics", "end_run"):
        setattr(module, verb, lambda *a, verb=verb, **k: calls.append((verb, a, k)))
    info = SimpleNamespace(info=SimpleNamespace(run_id="xyz"))
    module.start_run = lambda **how: calls.append(("start_run", (), how)) or info  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for begin in (0, 2):
        run(Mlflow(uri="file:x").build(Path()), begin, begin + 1).close("failed")
    assert [k["run_id"] for verb, _, k in calls if verb == "start_run"] == [None, "xyz"]
    assert ("end_run", ("FAILED",), {}) in calls
    assert any(verb == "log_metrics" and k == {"step": 3} for verb, _, k in calls)


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for tracker, extra in ((Wandb(), "wandb"), (Mlflow(), "mlflow")):
        with pytest.raises(UserError, match=rf"needs its package: pip install 'trainkit\[{extra}\]'"):
            Tracking(**{extra: tracker}).build(Path())


def test_trackers_are_told_in_the_order_of_the_fields() -> None:
    built = Tracking(jsonl=Jsonl(), console=Console()).build(Path())
    assert [type(t) for t in built._trackers] == [PlainTracker, JsonlTracker]
