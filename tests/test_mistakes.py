"""What a person types wrongly gets one line, exit code 2, and nothing is written."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SMALL
from trainkit import versions
from trainkit.cli import main

WRONG = {
    "model=tinny": "model has no choice 'tinny'; did you mean 'tiny'",
    "memory=checkpoint+8bits": "memory has no choice '8bits'",
    "memory=paged8bit": "memory=8bit+offload_optimizer keeps them on the host",
    "optimizer=paged_adamw8bit": "memory=8bit+offload_optimizer keeps them on the host",
    "optimizer=adamw_4bit": "optimizer=adamw memory=4bit",
    "memory=baseline,checkpoint": "memory=baseline,checkpoint is a sweep, and one run takes one choice",
    "memory=8bit+4bit": "8bit says memory.states.format=int8 and 4bit says int4: take one of the two",
    "memory=step_in_backward": "the gradient's norm is not known yet: set clip=0",
    "modle=tiny": "'modle' is not a key of a run; did you mean 'model'",
    "optimizer.lrr=1": "'optimizer.lrr' is not a key of a run; did you mean 'optimizer.lr'",
    "optimizer.lr=abc": "optimizer.lr=abc: input should be a valid number",
    "optimizer.lr=-1": "optimizer.lr=-1: input should be greater than 0",
    "optimizer.lr=true": "optimizer.lr=true: input should be a float",
    "optimizer.momentum=0.5": "optimizer=adamw has no 'momentum'; choices: betas, eps, kind, lr, weight_decay",
    "steps=1.5": "steps=1.5: input should be a valid integer",
    "steps=0": "steps=0: input should be greater than or equal to 1",
    "steps=40": "schedule.warmup=50 leaves nothing of steps=40",
    "schedule.kind=cosin": "schedule.kind=cosin is not a choice; did you mean 'cosine'",
    "optimizer.kind=adam": "optimizer=adam is not a choice; did you mean 'adamw'",
    "model.attention.heads=3": "model.width=128 is not a multiple of attention.heads=3",
    "data.length=512": "data.length=512 is longer than model.context=256",
    "model.vocab=100": "the tokenizer has 257 ids and model.vocab=100 has no room for them: use model.vocab=320",
    "data=text": "data.path is missing",
    "data.path=nowhere": "nowhere does not exist",
    "data.path=empty.txt": "empty.txt: nothing but empty files",
    "data.path=latin.txt": "latin.txt is not UTF-8 at byte 4 (0xe9)",
    "data.path=corpus/0.txt": "is no row of 256",
    "data=shards": "data.path is missing",
    "name=../up": "name=../up is not a folder's name",
    "checkpoint.keep=1": "checkpoint.keep=1: input should be greater than or equal to 2",
    "precision.params=float6": "precision.params=float6 is not a choice; did you mean 'float64'",
    "parallel.device=cuda:9": "parallel.device=cuda:9 is not here: there is cpu",
    "evaluation.metric=val_los": "evaluation.metric=val_los is not measured by causal_lm; did you mean 'val_loss'",
    "lr": "'lr' is not an override: write key=value",
}


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    err = capsys.readouterr().err
    return left.value.code, err  # type: ignore[return-value]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_gets_one_line_and_writes_nothing(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes("déjà".encode()[:1] + b"oub\xe9 vu")
    before = sorted(str(p) for p in Path().rglob("*"))
    code, err = said(capsys, "train", wrong)
    assert code == 2
    assert err.startswith("trainkit: ")
    assert err.count("\n") == 1, err
    assert WRONG[wrong] in err
    assert sorted(str(p) for p in Path().rglob("*")) == before


def test_a_verb_that_is_none_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = said(capsys, "trian")
    assert (code, err.count("\n")) == (2, 1)
    assert "No such command 'trian'. Did you mean 'train'?" in err
    code, err = said(capsys, "generate", "latest", "--promt", "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "--promt" in err


def test_several_processes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = said(capsys, "train", "nproc=4")
    assert code == 2
    assert "parallel=single trains in one process, but torchrun started 4" in err


def test_other_ranks_that_cannot_be_found_are_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, err = said(capsys, "train")
    assert (code, err.count("\n")) == (2, 1)
    assert "WORLD_SIZE=4 says that there are other ranks, and no MASTER_ADDR where" in err


def test_a_name_that_is_taken_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "train", *SMALL, "name=a")[0] == 0
    before = Path("runs/a/run.yaml").read_bytes()
    code, err = said(capsys, "train", *SMALL, "name=a", "optimizer.lr=0.5", "seed=3")
    assert code == 2
    assert "the name 'a' is taken by another run" in err
    assert "seed: 3 here, 0 there" in err
    assert "optimizer.lr: 0.5 here, 0.003 there" in err
    assert Path("runs/a/run.yaml").read_bytes() == before
    assert said(capsys, "train", *SMALL, "name=a", "memory=checkpoint", "tracking.every=2")[0] == 0


def test_resume_says_what_it_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = said(capsys, "resume")
    assert code == 2
    assert "there is no checkpoint in runs (it holds no runs)" in err
    said(capsys, "train", *SMALL, "name=abc")
    code, err = said(capsys, "resume", "abd")
    assert code == 2
    assert "looked for a run in runs and for a path; did you mean 'abc'" in err
    code, err = said(capsys, "resume", "abc/step-4")
    assert "the run abc has no checkpoint 'step-4': it has step-6" in err
    code, err = said(capsys, "resume", "abc", "optimizer.lr=1")
    assert code == 2
    assert "what is learned cannot change on resume (optimizer.lr)" in err
    code, err = said(capsys, "resume", "abc", "model=gpt2")
    assert "model= says what is learned" in err


def test_another_text_under_the_same_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", *SMALL, "name=a", "stop_at=3")
    Path("corpus/0.txt").write_text("something else entirely, and long enough to be read " * 3)
    code, err = said(capsys, "resume", "a")
    assert code == 2
    assert "was trained on another text" in err


def test_a_checkpoint_of_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", *SMALL, "name=a")
    run = Path("runs/a/run.yaml")
    run.write_text(run.read_text().replace("depth: 2", "depth: 3"))
    code, err = said(capsys, "resume", "a", "stop_at=7")
    assert code == 2
    assert "the checkpoint is another model's: it lacks the tensor backbone.blocks.2" in err


def test_damaged_checkpoints_never_mean_a_start_from_zero(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "train", *SMALL, "name=a", "checkpoint.every=3")
    for shard in Path("runs/a/checkpoints").glob("step-*/shard*"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    for verb in (["resume", "a"], ["resume", "a"], ["train", *SMALL, "name=a"]):
        code, err = said(capsys, *verb)
        assert (code, err.count("\n")) == (74, 1)
        assert "no checkpoint in runs/a/checkpoints is good" in err
    assert len(list(Path("runs/a/checkpoints").glob(".bad-*"))) == 2


def test_a_second_process_on_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "trainkit", "train", *SMALL, "name=a", "steps=100000"]
    first = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        while not Path("runs/a/metrics.jsonl").exists():
            time.sleep(0.1)
            assert first.poll() is None
        code, err = said(capsys, "train", *SMALL, "name=a", "steps=100000")
        assert code == 2
        assert f"the run a is in use by process {first.pid} on " in err
    finally:
        first.kill()
        first.wait()
    assert said(capsys, "train", *SMALL, "name=a", "steps=100000", "stop_at=1")[0] == 0  # a killed holder holds nothing


def test_a_full_or_read_only_disk_is_found_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(".")._replace(free=1000)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage)
        code, err = said(capsys, "train", *SMALL, "name=a")
    assert code == 2
    assert "has 1000 B free and the run's checkpoints need" in err
    code, err = said(capsys, "train", *SMALL, "name=a", "--runs", "/proc/nowhere")
    assert code == 2
    assert "/proc/nowhere/a cannot be written" in err


@pytest.mark.parametrize(("package", "version", "words"), [("torch", "2.10.1+cpu", "needs torch 2.11 or newer")])
def test_an_old_torch_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, version: str, words: str
) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    code, err = said(capsys, "train")
    assert code == 2
    assert words in err
    monkeypatch.setattr(versions.sys, "version_info", (3, 10, 0))
    assert "needs Python 3.11 or newer" in said(capsys, "train")[1]


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "trainkit", "--debug", "train", "model=tinny"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" in found.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\ntry:\n from trainkit.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
        "import json; print(json.dumps([m for m in ('torch', 'hydra', 'pydantic', 'numpy') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == []
