"""Processes that are forked from one that has imported everything, composed a run and measured the machine: a start takes a
tenth of a second of what it takes from nothing. All tests and scripts fork from the same one."""

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.warm"])


class Process(ForkServerProcess):
    """`Process(target=work, args=(...))`, as multiprocessing's."""

    def start(self) -> None:
        """The process that is forked looks for `tests` where the tests are, and not in the folder of the one that is first."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with mock.patch.dict(os.environ, PYTHONPATH=path):
            forkserver.ensure_running()
        super().start()
