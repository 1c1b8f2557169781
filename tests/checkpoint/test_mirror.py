"""The mirror's thread: what it uploads and in which order, what it says, what it never does to training."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.remotes import at, empty_memory, saved
from trainkit.checkpoint.manifest import NAME
from trainkit.checkpoint.mirror import Mirror, last_state
from trainkit.checkpoint.remote import Remote
from trainkit.checkpoint.storage import RemoteError, Storage

pytest.importorskip("fsspec", reason="needs fsspec: pip install 'trainkit[remote]'")
URL = "memory://far/p"
RUN = Path("runs/t")
PATIENCE_S = 20.0  # for what has to happen, however busy the machine is


def differs(one: str, other: str) -> list[str]:
    return [] if one == other else ["model.depth: 2 and 4"]


def until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gate:
    """`Remote.upload` that waits, or fails as it is told, and says what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.open, self.error = threading.Event(), None  # type: tuple[threading.Event, Exception | None]
        real = Remote.upload

        def upload(remote: Remote, folder: Path) -> Any:
            self.asked.append(int(folder.name[-10:]))
            assert self.open.wait(PATIENCE_S)
            if self.error is not None:
                raise self.error
            return real(remote, folder)

        monkeypatch.setattr(Remote, "upload", upload)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def mirror(notes: list[str]) -> Iterator[Mirror]:
    empty_memory()
    RUN.mkdir(parents=True)
    it = Mirror(URL, RUN, notes.append, differs=differs, backoff_s=(0.001, 0.004))
    yield it
    it.close(PATIENCE_S)


def there() -> list[int]:
    return list(Remote(URL).checkpoints("t"))


def test_what_is_submitted_is_uploaded_and_said_in_the_state(mirror: Mirror, notes: list[str]) -> None:
    assert mirror.state == {"url": URL, "uploaded_step": None, "waiting_step": None, "problem": None}
    mirror.submit(saved(1))
    mirror.close(PATIENCE_S)
    assert there() == [1]
    assert mirror.state == {"url": URL, "uploaded_step": 1, "waiting_step": None, "problem": None}
    assert last_state(RUN) == mirror.state
    assert mirror.holds() == set()
    assert notes == []
    again = Mirror(URL, RUN, notes.append, differs=differs)
    assert again.state["uploaded_step"] == 1
    again.close(PATIENCE_S)
    other = Mirror("memory://else", RUN, notes.append, differs=differs)
    assert other.state["uploaded_step"] is None
    other.close(PATIENCE_S)


def test_nothing_waits_for_a_remote_that_hangs_and_the_newest_wins(mirror: Mirror, gate: Gate) -> None:
    folders = {step: saved(step) for step in range(1, 7)}
    mirror.submit(folders[1])
    until(lambda: gate.asked)
    for step in range(2, 7):
        mirror.submit(folders[step], kept=step in (2, 4))
    mirror.keep({4, 6})
    assert mirror.holds() == {folders[1], folders[4], folders[6]}
    assert mirror.state["waiting_step"] == 6
    gate.open.set()
    mirror.close(PATIENCE_S)
    assert gate.asked == [1, 6, 4]
    assert there() == [4, 6]
    assert mirror.state["uploaded_step"] == 6


def test_one_that_is_not_kept_any_more_is_not_uploaded(mirror: Mirror, gate: Gate) -> None:
    mirror.submit(saved(1))
    until(lambda: gate.asked)
    mirror.submit(saved(2), kept=True)
    mirror.submit(saved(3))
    mirror.keep({1, 3})
    gate.open.set()
    mirror.close(PATIENCE_S)
    assert gate.asked == [1, 3]


def test_it_warns_once_and_says_once_that_it_caught_up(mirror: Mirror, gate: Gate, notes: list[str]) -> None:
    gate.open.set()
    gate.error = RemoteError("down")
    mirror.submit(saved(1), kept=True)
    until(lambda: len(gate.asked) > 5)
    assert len(notes) == 1
    assert "warning" in notes[0]
    assert "down" in notes[0]
    assert mirror.state["problem"] == "down"
    assert (last_state(RUN) or {})["waiting_step"] == 1
    mirror.submit(saved(2))
    until(lambda: 2 in gate.asked)
    assert set(gate.asked[gate.asked.index(2) + 1 :]) <= {2}
    gate.error = None
    until(lambda: mirror.state["uploaded_step"] == 2)
    mirror.close(PATIENCE_S)
    assert there() == [1, 2]
    assert len(notes) == 2
    assert "caught up: step 2" in notes[1]
    assert mirror.state["problem"] is None
    assert mirror.describe() == f"{URL}, step 2 is there"


def test_one_that_failed_makes_way_for_a_newer(mirror: Mirror, gate: Gate) -> None:
    gate.error = RemoteError("down")
    mirror.submit(saved(1))
    until(lambda: gate.asked)
    mirror.submit(newer := saved(2))
    gate.open.set()
    until(lambda: len(gate.asked) > 3)
    assert gate.asked[:3] == [1, 2, 2]
    assert mirror.holds() == {newer}
    gate.error = None


def test_waits_double_to_a_limit_and_are_shortened_at_random(
    mirror: Mirror, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[float, float]] = []
    slept: list[float] = []
    mirror._backoff_s = (1.0, 60.0)
    real = mirror._changed.wait_for
    monkeypatch.setattr("random.uniform", lambda *bounds: waits.append(bounds) or 1.0)

    def wait_for(done: Callable[[], Any], timeout: float | None = None) -> Any:
        if timeout is None:
            return real(done)
        slept.append(timeout)
        return real(done, 0.0)

    monkeypatch.setattr(mirror._changed, "wait_for", wait_for)
    gate.error = RemoteError("down")
    gate.open.set()
    mirror.submit(saved(1))
    until(lambda: len(slept) >= 9)
    gate.error = None
    mirror.close(PATIENCE_S)
    assert slept[:9] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert set(waits) == {(0.5, 1.0)}


def test_after_its_deadline_one_is_given_up_and_the_next_is_tried(mirror: Mirror, gate: Gate, notes: list[str]) -> None:
    mirror._deadline_s = 0.05
    gate.error = RemoteError("down")
    gate.open.set()
    mirror.submit(saved(1))
    until(lambda: len(notes) == 2)
    assert "step 1 is not on memory://far/p after 0.05 s: given up" in notes[1]
    assert mirror.holds() == set()
    gate.error = None
    mirror.submit(saved(2))
    mirror.close(PATIENCE_S)
    assert there() == [2]


def test_it_prunes_only_what_is_older_than_a_whole_one(mirror: Mirror) -> None:
    for step in (1, 2, 3, 4):
        Remote(URL).upload(saved(step))
    storage = Storage(URL)
    storage.write(at(0, "train_state.json"), b"half of an upload")
    storage.remove(at(4, NAME))  # not whole
    mirror.keep({2, 5})
    until(lambda: Remote(URL).steps("t") == [2, 3, 4])  # 5 is not there yet, so that the newest whole one stays
    mirror.submit(saved(5))
    mirror.close(PATIENCE_S)
    assert Remote(URL).steps("t") == there() == [2, 5]


def test_without_being_asked_it_removes_nothing(mirror: Mirror) -> None:
    for step in (1, 2, 3):
        mirror.submit(saved(step))
        until(lambda step=step: mirror.state["uploaded_step"] == step)
    assert there() == [1, 2, 3]


def test_another_run_of_that_name_is_left_alone(mirror: Mirror, notes: list[str]) -> None:
    Remote(URL).upload(saved(7, **{"run.yaml": b"name: t\nmodel: other\n"}))
    before = content_there()
    mirror.submit(saved(8))
    mirror.keep({8})
    until(lambda: notes)
    mirror.submit(saved(9))
    mirror.close(PATIENCE_S)
    assert content_there() == before
    assert notes == [f"warning: nothing is mirrored: {URL}/t is another run (model.depth: 2 and 4): choose another URL"]
    assert mirror.holds() == set()
    assert "another run" in mirror.state["problem"]


def content_there() -> dict[str, bytes]:
    fs = Storage(URL)._fs
    return {path: fs.cat_file(path) for path in fs.find("/far")}


def test_a_damaged_local_one_is_said_and_the_next_is_uploaded(mirror: Mirror, notes: list[str]) -> None:
    bad = saved(1)
    (bad / "train_state.json").unlink()
    mirror.submit(bad)
    until(lambda: notes)
    mirror.submit(saved(2))
    mirror.close(PATIENCE_S)
    assert there() == [2]
    assert len(notes) == 1
    assert "step-0000000001 is not mirrored: train_state.json is missing" in notes[0]


def test_close_gives_up_in_time_with_a_note(mirror: Mirror, gate: Gate, notes: list[str]) -> None:
    mirror.submit(saved(3))
    until(lambda: gate.asked)
    mirror.close(0.05)
    assert notes == [f"warning: step 3 is not on {URL} after 0.05 s: given up"]
    assert mirror.holds() == set()
    before = (RUN / "mirror.json").read_bytes()
    assert json.loads(before)["waiting_step"] == 3
    gate.open.set()
    mirror._thread.join(PATIENCE_S)
    assert not mirror._thread.is_alive()
    assert (RUN / "mirror.json").read_bytes() == before  # the run's folder may be another process's by now
    assert len(notes) == 1
    mirror.close(0.0)


def test_close_tries_at_once_what_waits(notes: list[str], gate: Gate) -> None:
    empty_memory()
    mirror = Mirror(URL, RUN, notes.append, differs=differs, backoff_s=(600.0, 600.0))
    gate.error = RemoteError("down")
    gate.open.set()
    mirror.submit(saved(1))
    until(lambda: notes)
    gate.error = None
    mirror.close(PATIENCE_S)
    assert there() == [1]


def test_a_fault_of_its_own_ends_it_and_not_training(mirror: Mirror, gate: Gate, notes: list[str]) -> None:
    gate.error = ZeroDivisionError("a bug")
    gate.open.set()
    mirror.submit(saved(1))
    until(lambda: notes)
    assert "the mirror stopped: ZeroDivisionError" in notes[0]
    mirror.submit(saved(2))
    assert mirror.holds() == set()
    mirror.close(PATIENCE_S)


def test_the_state_is_for_lists_alone(mirror: Mirror) -> None:
    mirror.submit(saved(1))
    until(lambda: mirror.state["uploaded_step"] == 1)
    os.rename(RUN / "mirror.json", "aside")
    (RUN / "mirror.json").mkdir()
    mirror.submit(saved(2))
    mirror.close(PATIENCE_S)
    assert there() == [1, 2]
    assert last_state(RUN) is None
