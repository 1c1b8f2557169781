"""A rank is killed at a random step: it is named, the others end, and the run ends as one that was left alone.

`scripts/rank_drill` does it twenty times, and to a whole machine."""

import random
from pathlib import Path

import pytest

from tests.rank_drill import Drills
from tests.rank_server import Server


@pytest.mark.timeout(900)
def test_a_killed_rank_is_named_and_nothing_is_lost(server: Server, tmp_path: Path) -> None:
    drills = Drills(server, tmp_path, random.Random(0))
    drills.whole("whole", 2, "parallel=ddp")
    assert drills.kill_a_rank("killed", "whole", 2, "parallel=ddp") is None
