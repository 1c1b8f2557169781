"""What a run passed over is on the disk before the run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_guard import batches, fit, only_in, poison, with_many
from trainkit.trainer import Trainer


def test_a_rewind_is_durable_before_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """A kill between the two must find it: else the same batches are learned from, and go bad, again."""
    with_many(place)
    poison(monkeypatch, only_in(batches(), 7))
    restore, known = Trainer.restore, []

    def restored(self: Trainer, tensors: Any, state: Any) -> None:
        known.append(len(json.loads(Path("runs/t/history.json").read_text())))
        restore(self, tensors, state)

    monkeypatch.setattr(Trainer, "restore", restored)
    fit("guard.policy=rewind", "guard.pass_over=1", "checkpoint.every=3")
    assert known == [1]
