"""What a person does, from the first command to the last, through the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL
from trainkit.cli import main


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    out, err = capsys.readouterr()
    assert left.value.code == 0, err
    return out


def metrics(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]


def test_from_the_first_command_to_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    how = [
        "evaluation.every=2",
        "evaluation.sample_tokens=5",
        "checkpoint.every=2",
        "tracking=console+jsonl+tensorboard",
    ]
    out = said(capsys, "train", *SMALL, *how, "name=a", "stop_at=4")
    assert "run: a, 4 steps" in out
    assert "model: 11.3K parameters" in out
    assert "4 rows × 1 accumulated × 1 rank = 4 rows of 32: 128 tokens a step" in out
    assert "--- sample at step 2" in out
    assert "trainkit resume a\n" in out
    out = said(capsys, "resume", "latest", "memory.microbatch=2", "memory=checkpoint")
    assert "run: a, step 4 to 4" in out
    out = said(capsys, "resume", "stop_at=5")
    assert "run: a, step 4 to 5" in out
    assert "2 rows × 2 accumulated × 1 rank" in out
    assert "checkpoint (exact)" in out
    out = said(capsys, "train", *SMALL, *how, "name=a")
    assert "run: a, step 5 to 6" in out
    assert "a is at step 6 of 6. What to try next:" in out
    assert "a is at step 6 of 6 already" in said(capsys, "train", *SMALL, *how, "name=a")
    assert [line["step"] for line in metrics("a")] == [1, 2, 3, 4, 5, 6]
    assert all("val_loss" in line for line in metrics("a")[1::2])
    assert {p.name for p in Path("runs/a").iterdir()} == {
        "LOCK",
        "heartbeat.json",
        "run.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }

    found = json.loads(said(capsys, "list-checkpoints", "--json"))
    assert {entry["run"] for entry in found} == {"a"}
    assert [entry["step"] for entry in found][-2:] == [5, 6]
    newest = found[-1]
    assert {"latest", "rolling"} <= set(newest["tiers"])
    assert newest["verified"] is True
    assert newest["bytes"] == sum(f.stat().st_size for f in Path(newest["path"]).iterdir() if f.name != "manifest.json")
    assert newest["val_loss"] == metrics("a")[-1]["val_loss"]
    table = said(capsys, "list-checkpoints")
    assert re.search(r"a +6 +latest .*yes", table)

    evaluated = json.loads(said(capsys, "evaluate", "a", "--json"))
    assert evaluated["val_loss"] == pytest.approx(newest["val_loss"], rel=1e-6)
    assert "bits per byte" in said(capsys, "evaluate", "a/step-6")
    Path("other").mkdir()
    Path("other/a.txt").write_text("zzz qqq " * 300)
    other = json.loads(
        said(capsys, "evaluate", newest["path"], "data=text", "data.path=other", "data.length=32", "--json")
    )
    assert other["val_loss"] != evaluated["val_loss"]
    once = said(capsys, "generate", "a", "--prompt", "the quick", "--tokens", "20", "--seed", "3")
    assert once.startswith("the quick")
    assert once == said(capsys, "generate", newest["path"], "--prompt", "the quick", "--tokens", "20", "--seed", "3")
    Path("runs").rename("elsewhere")  # a checkpoint is whole by itself
    moved = newest["path"].replace("runs", "elsewhere", 1)
    assert said(capsys, "generate", moved, "--prompt", "the quick", "--tokens", "20", "--seed", "3") == once


def test_the_best_is_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    how = [
        "checkpoint.every=2",
        "evaluation.every=2",
        "evaluation.sample_tokens=0",
        "optimizer.lr=0.01",
        "schedule=constant",
    ]
    said(capsys, "train", *SMALL, *how, "name=a", "schedule.warmup=1", "steps=12", "tracking=console+jsonl")
    found = {line["step"]: line["val_loss"] for line in metrics("a") if "val_loss" in line}
    best = min(found, key=lambda step: found[step])
    assert json.loads(said(capsys, "evaluate", "best", "--json"))["step"] == best
    tiers = {e["step"]: e["tiers"] for e in json.loads(said(capsys, "list-checkpoints", "a", "--json"))}
    assert [step for step, its in tiers.items() if "best" in its] == [best]
    assert f"step {best} to 12" in said(capsys, "resume", "best")


def test_going_back_to_the_best_or_to_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", *SMALL, "name=a", "checkpoint.every=2", "checkpoint.keep=4", "tracking=console+jsonl")
    out = said(capsys, "resume", "a/step-2", "stop_at=3")
    assert "run: a, step 2 to 3" in out
    assert "step-0000000006 was set aside" in out
    assert [line["step"] for line in metrics("a")] == [1, 2, 3]
    assert "run: a, step 3 to 6" in said(capsys, "resume", "latest", "stop_at=6")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_with_75(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "trainkit", "train", *SMALL, "name=a", "steps=100000"]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    written = Path("runs/a/metrics.jsonl")
    while not written.exists() or written.stat().st_size < 2000:
        time.sleep(0.05)
        assert run.poll() is None
    run.send_signal(signal.SIGUSR1)
    while not list(Path("runs/a/checkpoints").glob("step-*")):
        time.sleep(0.05)
        assert run.poll() is None  # it saved, and goes on
    run.send_signal(number)
    out, _ = run.communicate(timeout=30)
    assert run.returncode == 75
    steps = [line["step"] for line in metrics("a")]
    saved = [int(p.name.removeprefix("step-")) for p in Path("runs/a/checkpoints").glob("step-*")]
    assert max(saved) == steps[-1]
    assert "trainkit resume a" in out


def test_prepare_and_train_on_shards(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(
        capsys, "prepare", "corpus", "--out", "shards", "--tokenizer", "bpe", "--vocab", "300", "--validation", "0.2"
    )
    assert "of 10 documents" in out
    assert "trainkit train data=shards data.path=shards model.vocab=" in out
    small = [w for w in SMALL if w not in ("data=text", "data.path=corpus", "data.validation=0.2")]
    said(capsys, "train", *small, "data=shards", "data.path=shards", "data.length=16", "name=s")
    assert said(capsys, "generate", "s", "--prompt", "fox", "--tokens", "3").startswith("fox")


def test_config_shows_the_run_and_what_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "config", "model=gpt2", "optimizer.lr=3e-4", "data.length=1024")
    assert "name: gpt2-moby-dick" in out
    assert "lr: 0.0003" in out
    groups = said(capsys, "config", "--groups")
    assert re.search(
        r"^memory: +4bit, 8bit, baseline, checkpoint, default, fp8, fused_loss, offload_activations, ", groups, re.M
    )
    experiment = said(capsys, "config", "experiment=char")
    assert "name: char" in experiment


def test_doctor_finds_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {row["what"]: row for row in json.loads(said(capsys, "doctor", "--json"))}
    assert found["torch"]["status"] == "ok"
    assert "GFLOP/s measured" in found["cpu float32"]["value"]
    assert found["runs can be saved"]["status"] == "ok"
    assert not list(Path().glob(".trainkit-*"))
    assert "torch" in said(capsys, "doctor")
    broken = {row["what"]: row for row in json.loads(said(capsys, "doctor", "--json", "--runs", "/proc/x"))}
    assert broken["runs can be saved"]["status"] == "bad"


def test_completion_knows_groups_and_choices() -> None:
    from trainkit.cli_options import complete

    assert complete("mem") == ["memory="]
    assert complete("memory=checkpoint+offload_a") == ["memory=checkpoint+offload_activations"]
    assert "model=gpt2" in complete("model=gpt")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"trainkit \d+\.\d+\.\d+\n", said(capsys, "--version"))


def test_libraries_say_nothing_that_nobody_can_mend() -> None:
    said = "import logging; from trainkit.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    said += (
        "import torch.utils._pytree\n[logging.getLogger(n).warning('no') for n in ('torchao', 'torch.utils._pytree')]"
    )
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stderr == ""
