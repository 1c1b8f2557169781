"""Processes that are forked from one that has imported everything, composed a run and measured the machine: a start takes a
tenth of a second of what it takes from nothing. All tests and scripts fork from the same one."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.warm"])


class Process(ForkServerProcess):
    """`Process(target=work, args=(...))`, as multiprocessing's."""

    def start(self) -> None:
        with _found_from_anywhere():
            forkserver.ensure_running()
        super().start()


@contextlib.contextmanager
def _found_from_anywhere() -> Iterator[None]:
    """The process that is forked looks for `tests` where the tests are, and not in the folder of the one that is first."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
