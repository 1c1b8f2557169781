"""A process that saves under the shim, shared by the tests of faults."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoint.faults.client import Job, saver
from tests.checkpoint.faults.shim import build


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    return library


@pytest.fixture(scope="session")
def at(shim: Path) -> Iterator[Callable[..., Job]]:
    with saver(shim) as it:
        yield it


@pytest.fixture
def job(at: Callable[..., Job], tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """Do a job in a process that has everything imported already; what it answered, or that it was killed."""
    return at(tmp_path, asynchronous=bool(request.param))
