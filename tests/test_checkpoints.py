"""Looking after checkpoints: verify, show, diff, average, prune, import."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from trainkit import checkpoints, convert
from trainkit.checkpoint import find, load
from trainkit.cli import main
from trainkit.errors import UserError
from trainkit.launch import policy
from trainkit.trainer import Trainer

RUNS = Path("runs")
Trained = Callable[..., Trainer]


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    captured = capsys.readouterr()
    assert (left.value.code or 0) == code, captured
    return captured.out + captured.err


def model_of(which: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load(find.resolve(which, RUNS, policy)).tensors.items() if k.startswith("model.")}


def test_verify_names_what_is_bad(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained("checkpoint.every=2", "checkpoint.keep=3")
    capsys.readouterr()
    assert said(capsys, "checkpoint", "verify").count("good ") == 1
    assert said(capsys, "checkpoint", "verify", "t", "--all").count("good ") == 3
    shard = next(Path("runs/t/checkpoints/step-0000000004").glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    out = said(capsys, "checkpoint", "verify", "t", "--all", code=74)
    assert f"bad   runs/t/checkpoints/step-0000000004: {shard.name}: it is not what was saved" in out
    assert out.count("good ") == 2
    assert "not good" in said(capsys, "checkpoint", "diff", "t/step-4", "t/step-6", code=74)


def test_show_and_diff(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained("checkpoint.every=3", "checkpoint.keep=3")
    trained("optimizer.lr=0.01", name="u")
    capsys.readouterr()
    shown = json.loads(said(capsys, "checkpoint", "show", "t", "--json"))
    assert shown["step"] == 6
    assert shown["bytes"]["optimizer"] > 2 * shown["bytes"]["model"]
    assert "step 6, saved" in said(capsys, "checkpoint", "show", "t")
    assert "config: optimizer.lr: 0.003 here, 0.01 there" in said(capsys, "checkpoint", "diff", "t", "u")
    moved = json.loads(said(capsys, "checkpoint", "diff", "t/step-3", "t/step-6", "--json"))
    assert moved["config"] == moved["only_in_first"] == []
    a, b = model_of("t/step-3"), model_of("t/step-6")
    name = "model.backbone.embed.weight"
    assert moved["moved"][name]["relative_change"] == pytest.approx(float((b[name] - a[name]).norm() / a[name].norm()))
    same = json.loads(said(capsys, "checkpoint", "diff", "t", "t", "--json"))
    assert same["moved"] == {}


def test_average(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained("checkpoint.every=2", "checkpoint.keep=3")
    trained("model.width=32", name="wide")
    capsys.readouterr()
    which = ["t/step-2", "t/step-4", "t/step-6"]
    assert "trainkit evaluate mean" in said(capsys, "checkpoint", "average", *which, "--out", "mean")
    parts, mean = [model_of(w) for w in which], model_of("mean")
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([p[name] for p in parts]).double().mean(0).float())
    assert "loss" in said(capsys, "evaluate", "mean")
    assert "another model's" in said(capsys, "checkpoint", "average", "t", "wide", "--out", "no", code=2)
    assert "already" in said(capsys, "checkpoint", "average", "t", "t", "--out", "mean", code=2)
    assert not Path("runs/no").exists()


def test_prune_shows_first(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    trained("checkpoint.every=1", "checkpoint.keep=6")
    capsys.readouterr()
    assert "nothing to remove" in said(capsys, "checkpoint", "prune", "t")
    out = said(capsys, "checkpoint", "prune", "t", "checkpoint.keep=2", code=2)
    assert "step-0000000001" in out
    assert "give --yes" in out
    assert len(list(Path("runs/t/checkpoints").iterdir())) == 6
    said(capsys, "checkpoint", "prune", "t", "checkpoint.keep=2", "--yes")
    left = sorted(p.name for p in Path("runs/t/checkpoints").iterdir())
    assert left == ["step-0000000005", "step-0000000006"]


def state(learner: object) -> dict[str, torch.Tensor]:
    return {k: v + 1 for k, v in learner.model.state_dict().items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["plain", "nested", "dcp"])
def test_import_takes_weights_and_nothing_else(
    kind: str, learner: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    given = state(learner())
    if kind == "dcp":
        from torch.distributed import checkpoint as dcp

        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": given}, checkpoint_id="theirs")
    else:
        torch.save(given if kind == "plain" else {"model_state_dict": given, "iter": 7}, "theirs")
    said(capsys, "checkpoint", "import", "theirs", "--name", "mine", *SMALL)
    found = model_of("mine")
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in given.items())
    assert "went on from step 0" in said(capsys, "resume", "mine", "tracking=console+jsonl")
    assert json.loads(Path("runs/mine/metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert "is it this model's?" in said(
        capsys, "checkpoint", "import", "theirs", "--name", "other", *SMALL, "model.tied=false", code=2
    )


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("executed",)


def test_import_executes_nothing(tmp_path: Path) -> None:
    torch.save({"model": Evil()}, "evil")
    folder = tmp_path / "evil-dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    for source in (Path("evil"), folder):
        with pytest.raises(UserError, match="cannot be imported"):
            convert.tensors_of(source)
    assert not Path("executed").exists()
    with pytest.raises(UserError, match="there is no"):
        checkpoints.imported(Path("nowhere"), "x", SMALL, RUNS)


def test_copy_and_mirror_and_go_on_elsewhere(
    trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    far = f"file://{tmp_path}/far"
    trained("stop_at=4", "checkpoint.every=2", f"checkpoint.mirror={far}")
    capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "far/t/checkpoints").iterdir()) == ["step-0000000002", "step-0000000004"]
    assert "step 4" in said(capsys, "list-checkpoints").split("mirror of t")[1]
    assert json.loads(said(capsys, "list-checkpoints", "--json"))[0]["mirror"]["uploaded_step"] == 4
    said(capsys, "resume", f"{far}/t", "stop_at=6", "--runs", "elsewhere")
    whole = trained(name="whole").learner.step
    assert whole == 6
    there = load(find.resolve("t", Path("elsewhere"), policy)).tensors
    here = load(find.resolve("whole", RUNS, policy)).tensors
    assert [k for k, v in here.items() if not torch.equal(there[k], v)] == []
    capsys.readouterr()
    assert "trainkit resume" in said(capsys, "checkpoint", "copy", "whole", f"file://{tmp_path}/more")
    assert "verified" in said(capsys, "checkpoint", "copy", f"file://{tmp_path}/more/whole", "back")
    assert "verified" in said(capsys, "checkpoint", "copy", "t/step-2", "beside")
    assert "step 2" in said(capsys, "checkpoint", "show", "t", "--runs", "beside")
    assert "no whole checkpoint" in said(capsys, "resume", f"{far}/nobody", "--runs", "new", code=2)


def test_nothing_is_sent_where_only_a_strangers_run_says(
    trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    far, ours = f"file://{tmp_path}/far", f"file://{tmp_path}/ours"
    trained("stop_at=2", f"checkpoint.mirror={far}")
    shutil.copytree("far", "sent")  # to somebody else, and who knows what far is to them
    shutil.copytree("runs", "given")
    capsys.readouterr()

    def at_far() -> list[str]:
        return sorted(p.name for p in Path("far/t/checkpoints").iterdir())

    line = f"the mirror {far} of its run.yaml is not where this run came from, and is left out: checkpoint.mirror= sets one"
    assert line in said(capsys, "resume", f"file://{tmp_path}/sent/t", "stop_at=3", "--runs", "one")
    assert "mirror: null" in Path("one/t/run.yaml").read_text()
    assert line not in said(capsys, "resume", "t", "stop_at=4", "--runs", "one")
    assert line in said(capsys, "resume", "given/t", "stop_at=3")
    assert line in said(capsys, "checkpoint", "copy", f"file://{tmp_path}/sent/t", "two")
    said(capsys, "resume", "t", "stop_at=3", "--runs", "two")
    assert at_far() == ["step-0000000002"]
    said(capsys, "resume", f"file://{tmp_path}/sent/t", "stop_at=3", "--runs", "three", f"checkpoint.mirror={ours}")
    assert Path("ours/t/checkpoints/step-0000000003").is_dir()
    assert line not in said(capsys, "resume", f"{far}/t", "stop_at=5", "--runs", "four")
    assert line not in said(capsys, "resume", "t", "stop_at=4")
    assert "step-0000000005" in at_far()


def test_a_mirror_out_of_reach_costs_nothing_but_a_warning(
    trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "far").touch()  # no folder can be made there
    trained(
        "checkpoint.every=2",
        f"checkpoint.mirror=file://{tmp_path}/far/x",
        "guard.deadline_s=1",
        "tracking=console+jsonl",
    )
    out = capsys.readouterr().out
    assert "saved step 6" in out
    assert "warning: the mirror" in out
