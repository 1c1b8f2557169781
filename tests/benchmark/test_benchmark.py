"""`trainkit benchmark` as a person types it: real processes, real files, one line for what is wrong."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trainkit
from tests.benchmark.made_up import found
from tests.benchmark.test_document import CONTRACT
from tests.benchmark.test_rounds import gone, until
from tests.conftest import SMALL
from trainkit.benchmark import process
from trainkit.cli import main

ROOT = Path(trainkit.__file__).parents[1]
WORDS = [word for word in SMALL if word.split("=")[0] not in ("steps", "model.depth")]
COMMAND = [sys.executable, "-m", "trainkit", "benchmark", *WORDS]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ROOM = 5 << 30  # addresses that a cell may have: more than a small one needs, less than a wide vocabulary


def left_with(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["benchmark", *words])
    return int(left.value.code or 0)


def little_room() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))


def test_a_sweep_from_the_command_to_the_files() -> None:
    """One good cell, one that a rule refuses, one that the allocator refuses."""
    words = ["memory=baseline,checkpoint,baseline", "precision=fp32,fp64,fp32", "model.vocab=320,320,120000000"]
    words += ["precision.compute=null,bfloat16,null", "--zip", "--rounds", "1", "--steps", "1", "--warmup", "1"]
    done = subprocess.run(
        [*COMMAND, *words, "--seed", "3", "--out", "out"],
        env={**os.environ, **ENVIRONMENT},
        preexec_fn=little_room,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(Path("out/benchmark.json").read_text())
    good, refused, oom = made["cells"]
    assert all(set(cell) >= CONTRACT for cell in made["cells"])
    assert [cell["status"] for cell in made["cells"]] == ["ok", "refused", "oom"]
    assert "can't allocate memory" in oom["error"]
    assert "float64 computes in float64" in refused["error"]
    assert good["overrides"][-1] == "seed=3"
    assert good["memory_by_category"].keys() >= {"parameters", "activations", "optimizer"}
    assert good["tokens_per_s"] > 0
    assert 0 < good["mfu"] < 2
    assert 4 < good["loss"] < 7
    assert made["settings"] == {"rounds": 1, "steps": 1, "warmup": 1, "ranks": 1, "threads": None}
    assert "--seed 3" in made["command"]
    assert "--zip" in made["command"]
    assert set(os.listdir("out")) == {f"benchmark.{kind}" for kind in ("json", "csv", "html", "png")}
    assert not Path("runs").exists()
    assert "oom" in done.stdout
    assert "tokens/s" in done.stderr


def test_a_benchmark_that_is_killed_takes_its_cell_along() -> None:
    begin = ["--steps", "1000000", "--rounds", "1"]
    running = subprocess.Popen([*COMMAND, *begin], env={**os.environ, **ENVIRONMENT}, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    try:
        assert until(lambda: children.read_text().strip())
        (cell,) = map(int, children.read_text().split())
        assert not gone(cell)
        running.kill()
        assert until(lambda: gone(cell))
    finally:
        running.kill()
        running.wait()


Turns = list[tuple[dict[str, Any], int]]


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """The turns that were asked for: nothing runs, and all find the same."""
    taken: Turns = []

    def run(spec: dict[str, Any], ranks: int) -> dict[str, Any]:
        taken.append((spec, ranks))
        assert list(Path(os.environ["TRAINKIT_CACHE"], "text").iterdir())  # the text is prepared before any turn
        return found(2.0, 100 if spec["memory"] else None)

    monkeypatch.setattr(process, "run", run)
    return taken


def test_what_is_typed_reaches_the_cells(turns: Turns, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["memory=baseline,checkpoint", "parallel=ddp", *SMALL]
    numbers = ["--rounds", "2", "--steps", "7", "--warmup", "4", "--seed", "9", "--nproc", "2"]
    assert left_with(*words, *numbers, "--json", "made.json", "--csv", "made.csv") == 0
    assert [ranks for _, ranks in turns] == [2] * 4
    spec = turns[0][0]
    assert spec["overrides"] == ["memory=baseline", "parallel=ddp", *SMALL, "seed=9"]
    assert (spec["steps"], spec["warmup"], spec["memory"], turns[2][0]["memory"]) == (7, 4, True, False)
    made = json.loads(Path("made.json").read_text())
    assert made["command"] == " ".join(["trainkit benchmark", *words, *numbers])
    assert "checkpoint" in capsys.readouterr().out
    assert left_with(*words, "--seed", "9", "--against", "made.json", "--html", "made.html") == 0
    assert "no worse" in capsys.readouterr().out
    assert "Against made.json" in Path("made.html").read_text()
    assert (turns[-1][0]["steps"], turns[-1][0]["warmup"], len(turns)) == (5, 2, 4 + 6)


def test_a_suite_brings_its_own_words(turns: Turns, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.context=256", "data=text", "data.path=corpus", "data.length=8", "data.validation=0.2"]
    assert left_with(*words, "--suite", "seeds", "--steps", "3", "--json", "made.json") == 0
    made = json.loads(Path("made.json").read_text())
    assert made["settings"] == {"rounds": 1, "steps": 3, "warmup": 1, "ranks": 1, "threads": None}
    assert len(made["cells"]) == 12
    statuses = [cell["status"] for cell in made["cells"]]
    assert statuses.count("ok") == len(turns) >= 4
    assert all(cell["status"] in ("ok", "refused") for cell in made["cells"])
    assert "GPT-2 124M, batch 32" in capsys.readouterr().out
    assert left_with(*words, "memory=baseline,checkpoint", "--suite", "seeds-small", "--json", "made.json") == 0
    found = json.loads(Path("made.json").read_text())["cells"]
    assert [cell["memory"] for cell in found] == ["baseline", "checkpoint"]
    assert all(cell["overrides"].count("data.batch=256") == 1 for cell in found)


def test_what_was_measured_until_ctrl_c_is_kept(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = process.run

    def interrupted(spec: dict[str, Any], ranks: int) -> dict[str, Any]:
        if len(turns) == 3:
            raise KeyboardInterrupt
        return whole(spec, ranks)

    monkeypatch.setattr(process, "run", interrupted)
    assert left_with("memory=baseline,checkpoint", *SMALL, "--json", "made.json") == 130
    made = json.loads(Path("made.json").read_text())
    assert [len(cell["rounds"]) for cell in made["cells"]] == [2, 1]


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("oom", 0), ("refused", 0)])
@pytest.mark.usefixtures("turns")
def test_a_failure_is_told_by_the_exit_code(status: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = process.run

    def run(spec: dict[str, Any], ranks: int) -> dict[str, Any]:
        bad = spec["overrides"][0] == "memory=checkpoint"
        return {"status": status, "error": "a shame"} if bad else whole(spec, ranks)

    monkeypatch.setattr(process, "run", run)
    assert left_with("memory=baseline,checkpoint", *SMALL, "--rounds", "1", "--json", "made.json") == code
    assert [cell["status"] for cell in json.loads(Path("made.json").read_text())["cells"]] == ["ok", status]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory=baseline,chekpoint"], "memory has no choice 'chekpoint'; did you mean 'checkpoint'?"),
        (["data.batch=4,four"], "data.batch=four: input should be a valid integer"),
        (["data=text", "data.path=nowhere,corpus"], "nowhere"),
        (["parallel.device=cpu,cuda:7"], "parallel.device=cuda:7 is not here"),
        (["--suite", "sead"], "there is no suite 'sead'; did you mean 'seeds'"),
        (["--against", "missing.json"], "--against missing.json cannot be read"),
        (["--json", "no/made.json"], "--json no/made.json cannot be written"),
        (["--nproc", "2"], "--nproc 2 is for parallel=ddp, fsdp and the like"),
        (["precision=fp64", "precision.compute=bfloat16"], "float64 computes in float64"),
        (["model.vocab=16,320"], "model.vocab=16 has no room"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(
    words: list[str], said: str, turns: Turns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(*SMALL, *words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert not turns


def test_under_torchrun_it_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert left_with(*SMALL) == 2
    assert "trainkit benchmark --nproc N" in capsys.readouterr().err


def test_train_still_takes_one_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "memory=baseline,checkpoint"])
    assert left.value.code == 2
    assert "is a sweep, and one run takes one choice" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    look = (
        "import sys; from trainkit.benchmark import command; print(*{'torch', 'hydra', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], env={**os.environ, **ENVIRONMENT}, capture_output=True, check=True
    )
    assert done.stdout.strip() == b""
