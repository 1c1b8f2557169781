"""A process that saves under the shim, shared by the tests of faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.faults.client import Job, saver
from tests.checkpoint.faults.shim import build


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = build(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("needs Linux and a C compiler")
    return library


@pytest.fixture
def job(shim: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    """Do a job in a process that has everything imported already; what it answered, or that it was killed."""
    with saver(shim, tmp_path, asynchronous=bool(request.param)) as do:
        yield do
