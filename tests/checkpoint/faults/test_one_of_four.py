"""One of four ranks is killed, or stopped, in the middle of a save: the others are gone soon, and the run goes on to the bit.

`scripts/rank_faults` does it at every call."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.faults.training import RANKS, Training
from tests.short_runs import write_corpus


@pytest.fixture
def training(shim: Path, tmp_path: Path) -> Iterator[Training]:
    import random

    write_corpus(tmp_path / "corpus.txt", 60, random.Random(0))
    with Training(shim, tmp_path) as it:
        yield it


@pytest.mark.timeout(600)
def test_one_of_four_ranks_ends_in_a_save(training: Training) -> None:
    how = "checkpoint.asynchronous=false"
    whole = training.train("whole", how)
    assert whole.codes == [0] * RANKS
    assert whole.calls > 15
    for fault, victim, at in (("kill", 0, 13), ("stop", RANKS - 1, 1)):
        assert training.drill("whole", how, fault=fault, at=at, victim=victim) is None, (fault, victim, at)
