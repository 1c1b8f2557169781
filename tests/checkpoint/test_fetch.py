"""`trainkit resume URL`: an empty machine gets the run, and nothing that is here is written over."""

import os
from pathlib import Path

import pytest

from tests.checkpoint.remotes import RUN_YAML, at, change, content, empty_memory, flip, saved
from trainkit.checkpoint.fetch import fetch, is_url
from trainkit.checkpoint.lock import RunLock
from trainkit.checkpoint.manifest import NAME
from trainkit.checkpoint.remote import Remote
from trainkit.errors import DamagedError, UserError

pytest.importorskip("fsspec", reason="needs fsspec: pip install 'trainkit[remote]'")
URL = "memory://far/p"
HERE = Path("here")


@pytest.fixture(autouse=True)
def sent() -> list[Path]:
    empty_memory()
    folders = [saved(step) for step in (1, 2)]
    for folder in folders:
        Remote(URL).upload(folder)
    return folders


def got(url: str = f"{URL}/t", notes: list[str] | None = None) -> Path:
    differs = lambda one, other: [] if one == other else ["model.depth: 2 and 4"]  # noqa: E731
    return fetch(
        url, HERE, differs=differs, adopt=lambda text, base: text, note=(notes if notes is not None else []).append
    )


@pytest.mark.parametrize("ending", ["", "/", "/checkpoints/step-0000000001", "/step-1/"])
def test_an_empty_machine_gets_the_run(ending: str, sent: list[Path]) -> None:
    for _ in range(2):  # again changes nothing
        path = got(f"{URL}/t{ending}")
        wanted = sent[0] if "step" in ending else sent[1]
        assert path == HERE / "t" / "checkpoints" / wanted.name
        assert content(path) == content(wanted)
        assert (HERE / "t/run.yaml").read_text() == RUN_YAML
        assert sorted(os.listdir(HERE / "t")) == ["LOCK", "checkpoints", "run.yaml"]


def test_a_run_that_is_older_here_goes_on_from_there(sent: list[Path]) -> None:
    got(f"{URL}/t/step-1")
    (HERE / "t/run.yaml").write_text(RUN_YAML)
    assert content(got()) == content(sent[1])
    assert sorted(os.listdir(HERE / "t/checkpoints")) == ["step-0000000001", "step-0000000002"]


def test_what_is_newer_or_another_run_or_in_use_here_is_refused() -> None:
    saved(3, run=HERE / "t")
    with pytest.raises(
        UserError, match="here/t is at step 3, and the remote at step 2: go on with `trainkit resume t`"
    ):
        got()
    with pytest.raises(UserError, match="is at step 3"):
        got(f"{URL}/t/step-2")
    (HERE / "t/run.yaml").write_text("name: t\nmodel: other\n")
    with pytest.raises(UserError, match=r"is another run \(model.depth: 2 and 4\)"):
        got()
    (HERE / "t/run.yaml").unlink()
    with pytest.raises(UserError, match="is no run"):
        got()
    with RunLock(HERE / "t"), pytest.raises(UserError, match="in use"):
        got()
    assert sorted(os.listdir(HERE / "t/checkpoints")) == ["step-0000000003"]


def test_what_is_not_there_is_said_with_what_is() -> None:
    for url, what in (
        (f"{URL}/tt", "no whole checkpoint of a run 'tt'; did you mean 't'"),
        (f"{URL}/t/step-9", "no whole checkpoint of step 9: it has 1, 2"),
        (f"{URL}/..", "no name of a run"),
        ("memory://t", "not the URL"),
    ):
        with pytest.raises(UserError, match=what):
            got(url)
    assert not HERE.exists()


def test_a_damaged_newest_is_left_for_the_older_with_a_note(sent: list[Path]) -> None:
    change(Remote(URL), at(2, "train_state.json"), flip)
    notes: list[str] = []
    assert content(got(notes=notes)) == content(sent[0])
    assert len(notes) == 1
    change(Remote(URL), at(1, "run.yaml"), flip)
    change(Remote(URL), at(2, "run.yaml"), flip)
    with pytest.raises(DamagedError, match=r"no run.yaml of a checkpoint"):
        got()
    change(Remote(URL), at(2, NAME), flip)
    with pytest.raises(UserError, match="no whole checkpoint of step 2"):
        got(f"{URL}/t/step-2")


def test_what_a_url_is() -> None:
    assert all(is_url(u) for u in ("s3://b/t", "gs://b/t", "file:///a/t", "memory://t"))
    assert not any(is_url(u) for u in ("t", "runs/t", "/a/b", "t/step-1", "latest", "s3://", "C://x", "runs//t"))
