"""`profile=memory+time` around a run: it changes nothing, and what it writes is right."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import weights
from trainkit import build, doctor, hardware
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.learner import Learner
from trainkit.profile import MemoryProfile, Profile, TimeProfile
from trainkit.profile.allocations import Allocations, Block
from trainkit.profile.memory import consumers, maker
from trainkit.profile.profiler import Profiler
from trainkit.profile.timing import operators
from trainkit.trainer import Trainer

BOTH = ["profile=memory+time", "profile.memory.after=1", "profile.memory.steps=2", "profile.time.after=3"]
BOTH += ["profile.time.steps=2"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_that_is_looked_at_learns_the_same(
    trained: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained("tracking=console", "evaluation.every=1", name="plain")
    said = capsys.readouterr().out
    assert "profile:" not in said
    assert not Path("runs/plain/profile").exists()
    looked = trained("tracking=console", "evaluation.every=1", *BOTH, name="looked")
    assert torch.equal(weights(plain.learner), weights(looked.learner))
    assert plain.evaluated == looked.evaluated

    said = capsys.readouterr().out
    folder = Path("runs/looked/profile")
    assert said.count("\nprofile:") == 2
    assert f"profile: memory of steps 2 to 3 in {folder}: peak " in said
    assert f"profile: time of steps 5 to 6 in {folder} " in said
    names = ["memory.csv", "memory.png", "operators.csv", "spikes.csv", "trace.json.gz"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    table = rows(folder / "memory.csv")
    step = ["forward", "backward", "optimizer"]
    wanted = [*(("2", p) for p in step), *(("3", p) for p in step), ("", "evaluation"), ("", "save")]
    assert sorted((r["step"], r["phase"]) for r in table) == sorted(wanted)
    parameters = 4 * weights(plain.learner).numel()
    for row in table:
        numbers = [int(row[c]) for c in ("parameters", "gradients", "optimizer", "activations", "temporary")]
        assert sum(numbers) == int(row["peak"])
        assert numbers[0] == parameters
    spikes = rows(folder / "spikes.csv")
    assert [int(r["bytes"]) for r in spikes] == sorted((int(r["bytes"]) for r in spikes), reverse=True)
    assert all(0.02 < float(r["share_of_peak"]) < 1 for r in spikes)
    assert {"activations", "temporary"} <= {r["category"] for r in spikes}
    assert any(r["operator"] == "aten::cross_entropy_loss > aten::_log_softmax" and r["times"] == "2" for r in spikes)

    calls = {r["operator"]: r["calls_per_step"] for r in rows(folder / "operators.csv")}
    assert calls["aten::mm"] == "27"  # those of a step: the evaluation between the two is not counted

    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= {e["name"] for e in events if "name" in e}


def test_the_table_of_operators_counts_what_a_step_does(learner: Callable[..., Learner], tmp_path: Path) -> None:
    it = learner("model.mlp.activation=relu2")
    watch = TimeProfile(after=0, steps=2).build(tmp_path, torch.device("cpu"))
    watch.start()
    for number in (1, 2, 3):
        with watch.step(number):
            it.train_step()
    watch.stop()
    lines = watch.write()
    assert lines[0].startswith(f"profile: time of steps 2 to 3 in {tmp_path}")
    found = {o.name: o for o in operators(watch._profile.events(), torch.device("cpu"))}
    assert sum(o.share for o in found.values()) == pytest.approx(1)
    mm = found["aten::mm"]
    tokens, width, depth, vocab = 4 * 32, 16, 2, 320
    matrices = depth * (4 * width * width + 2 * 4 * width * width) + vocab * width
    assert mm.flops_per_s * mm.self_s == pytest.approx(6 * tokens * matrices)
    assert mm.calls == 3 * (4 * depth + 1)
    assert "outside operators" in found
    table = rows(tmp_path / "operators.csv")
    assert len(table) == len(found)
    assert float(table[0]["self_ms_per_step"]) == pytest.approx(max(o.self_s for o in found.values()) * 1e3, abs=1e-3)
    assert len(lines) == 2 + TimeProfile().top
    assert lines[2].split()[0] == table[0]["operator"][:48].split()[0]


def test_a_run_that_ends_early_is_looked_at_until_then(
    trained: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(
        "tracking=console", "profile=memory", "profile.memory.after=4", "profile.memory.picture=false", name="early"
    )
    assert "memory of steps 5 to 6" in capsys.readouterr().out
    assert not Path("runs/early/profile/memory.png").exists()
    trained("tracking=console", "profile=time", "profile.time.after=5", name="late")
    assert "the run ended before a step could be timed" in capsys.readouterr().out
    with Allocations(torch.nn.Linear(1, 1)):
        """Nobody looks any more."""


def test_what_is_only_looked_at_once(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    watch = MemoryProfile(picture=False).build(tmp_path, model, torch.optim.SGD(model.parameters()))
    profiler = Profiler([watch])
    for name in ("evaluation", "save", "evaluation"):
        with profiler.phase(name):
            torch.ones(100)
    assert [r["phase"] for r in rows(tmp_path / "memory.csv")] == ["evaluation", "save"]
    assert {r["temporary"] for r in rows(tmp_path / "memory.csv")} == {"400"}
    assert watch.aside("save") is None


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    notes: list[str] = []
    model = torch.nn.Linear(3, 3)
    watch = MemoryProfile(after=0, steps=1, picture=False).build(
        tmp_path / "profile", model, torch.optim.SGD(model.parameters())
    )
    profiler = Profiler([watch], notes.append)
    with profiler.step(1):
        model(torch.ones(1, 3)).sum().backward()
    assert len(notes) == 1
    assert notes[0].startswith("warning: a profile cannot be written")


def test_mistakes_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    with pytest.raises(
        UserError, match="steps 3 to 5 of a process and profile.time at 5 to 8.*change profile.time.after"
    ):
        runs.composed(["profile=memory+time", "profile.time.after=4"])
    Profile(memory=MemoryProfile(after=2, steps=3), time=TimeProfile(after=5))
    with pytest.raises(UserError, match="profile.memory.steps=0"):
        runs.composed(["profile=memory", "profile.memory.steps=0"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"matplotlib, which is not installed: pip install 'trainkit\[plot\]'"):
        build.check(runs.composed(["profile=memory"]))
    build.check(runs.composed(["profile=memory", "profile.memory.picture=false"]))
    build.check(runs.composed([]))


def test_an_older_run_resumes_without_a_profile() -> None:
    run = runs.composed([])
    text = run.yaml()
    assert "\nprofile:\n" in text
    older = text[: text.index("\nprofile:\n") + 1]
    assert runs.saved(older) == run
    assert runs.saved(older, ["profile=time"]).profile.time == TimeProfile()


def test_the_picture_can_be_read(learner: Callable[..., Learner]) -> None:
    from trainkit.profile.picture import COLOURS, figure

    it = learner("optimizer=adamw", "memory.microbatch=2")
    with Allocations(it.model, it.optimizer) as steps:
        for number in (1, 2):
            with steps.step(number):
                it.train_step()
    with Allocations(it.model, it.optimizer) as other, other.phase("evaluation"):
        it.task.evaluate(it.model, it.loader.validation(1), ranks=it.ranks, stop=lambda: False)
    drawn = figure([steps, other])
    drawn.draw_without_rendering()
    assert len(drawn.axes) == 2
    assert len(set(COLOURS.values())) == 5
    legend = [t.get_text() for t in drawn.legends[0].get_texts()]
    phases = ["forward", "backward", "optimizer"]
    assert legend == ["temporary", "activations", "gradients", "optimizer", "parameters", *phases]
    for axis, seen in zip(drawn.axes, (steps, other), strict=True):
        boxes = [t.get_window_extent() for t in axis.texts]
        assert boxes
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        top = max(collection.get_datalim(axis.transData).y1 for collection in axis.collections)
        assert top == pytest.approx(seen.peak / 1024)


def test_who_made_an_allocation() -> None:
    assert maker(Block(1, 0, ("autograd::engine::evaluate_function: Mm", "MmBackward0", "aten::mm"))) == (
        "MmBackward0 > aten::mm"
    )
    assert maker(Block(1, 0, ("aten::linear", "aten::matmul", "aten::mm"))) == "aten::linear > aten::mm"
    assert maker(Block(1, 0, ("aten::empty",))) == "aten::empty"
    assert maker(Block(1, 0, ("aten::add", "aten::empty"))) == "aten::add"
    assert maker(Block(1, -1)) == ""


def test_the_largest_consumers_add_up_to_the_peak(learner: Callable[..., Learner]) -> None:
    it = learner()
    it.train_step()
    with Allocations(it.model, it.optimizer) as seen:
        it.train_step()
    found = consumers(seen)
    assert sum(size for _, size in found) == seen.peak
    assert found == sorted(found, key=lambda it: -it[1])
    assert dict(found)["optimizer"] == seen.at_peak["optimizer"]


def test_readings_of_a_gpu_are_left_out_where_they_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(hardware.readings(torch.device("cpu"))) == ["memory_gb"]

    def no(*_: Any) -> float:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(hardware, "memory_in_use", lambda device: 2_000_000_000)
    gpu = torch.device("cuda", 0)
    assert hardware.readings(gpu) == {"memory_gb": 2.0}  # there is none here, and nothing is said of it
    monkeypatch.setattr(hardware, "_SENSORS", {"gpu_power_w": (lambda device: 350_500, 1e-3), "gpu_busy": (no, 1e-2)})
    assert hardware.readings(gpu) == {"memory_gb": 2.0, "gpu_power_w": 350.5}


def test_doctor_says_whether_a_gpu_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def no() -> float:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    for read, value in ((no, "cannot be read: nvidia-ml-py"), (lambda: 40, "power, temperature, clock")):
        monkeypatch.setattr(torch.cuda, "temperature", read)
        found = {f.what: f for f in doctor._accelerators()}["gpu readings"]
        assert found.value.startswith(value)
        assert bool(found.advice) == (read is no)
    assert "matplotlib" in {f.what for f in doctor._extras()}


def test_a_run_that_fails_leaves_what_was_seen_of_the_step(
    trained: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that runs out of memory."""
    real = Learner.clip_gradients

    def fails_in_step_three(it: Learner) -> torch.Tensor:
        if it.step == 2:
            raise torch.OutOfMemoryError("full")
        return real(it)

    monkeypatch.setattr(Learner, "clip_gradients", fails_in_step_three)
    with pytest.raises(torch.OutOfMemoryError):
        trained("profile=memory", "profile.memory.after=1", "profile.memory.picture=false", name="oom")
    table = rows(Path("runs/oom/profile/memory.csv"))
    assert [(r["step"], r["phase"]) for r in table if r["step"] == "3"] == [("3", "forward"), ("3", "backward")]
