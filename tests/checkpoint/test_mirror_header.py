"""What the header of a run says of its mirror."""

import json
from pathlib import Path

from tests.checkpoint.remotes import empty_memory
from trainkit.checkpoint.mirror import STATE, Mirror

URL = "memory://bucket/runs"


def said(run: Path) -> str:
    mirror = Mirror(URL, run, print, differs=lambda ours, theirs: [])
    mirror.close(60)
    return mirror.describe()


def test_it_says_how_far_the_mirror_has_come_and_that_it_failed_before(tmp_path: Path) -> None:
    empty_memory()
    assert said(tmp_path) == f"{URL}, nothing is there yet"
    state = {"url": URL, "uploaded_step": 20, "waiting_step": 30, "problem": "down"}
    (tmp_path / STATE).write_text(json.dumps(state))
    assert said(tmp_path) == f"{URL}, step 20 is there; it failed: down"
