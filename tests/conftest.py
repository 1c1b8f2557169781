"""Every test in a folder of its own, with a cache of its own; `learn` trains a small run in this process."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from trainkit import build
from trainkit import run as runs
from trainkit.learner import Learner
from trainkit.trainer import Trainer

if TYPE_CHECKING:
    from tests.rank_server import Server

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. "
SMALL = [
    "data=text",
    "data.path=corpus",
    "data.length=32",
    "data.batch=4",
    "data.validation=0.2",
    "model.width=16",
    "model.depth=2",
    "model.attention.heads=2",
    "model.context=64",
    "schedule.warmup=2",
    "steps=6",
    "tracking=jsonl",
    "tracking.every=1",
    "evaluation=end",
]


def pytest_collection_finish() -> None:
    """What was imported by now stays, and no garbage collection need look at its million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Server"]:
    """`server.program` is trainkit, forked from a process that has torch already: a start costs next to nothing."""
    from tests.rank_server import Server

    with Server(tmp_path_factory.mktemp("server")) as it:
        yield it


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with documents of different lengths in `corpus`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINKIT_CACHE", str(cache))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(TEXT[i:] * (1 + i % 3) + f"page {i}\n")
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # two would wait for each other on a busy machine


@pytest.fixture
def trained() -> Callable[..., Trainer]:
    """`trained("steps=3", name="a")` trains a small run to its end and gives back its trainer."""

    def train(*overrides: str, name: str = "t") -> Trainer:
        run = runs.composed([*SMALL, *overrides, f"name={name}"])
        with build.trainer(run, Path("runs") / name) as trainer:
            trainer.fit()
        return trainer

    return train


@pytest.fixture
def learner() -> Callable[..., Learner]:
    """`learner("optimizer=sgd")` is a small run's learner, which writes nothing."""

    def make(*overrides: str) -> Learner:
        run = runs.composed([*SMALL, *overrides, "name=t"])
        return build.learner(run, run.data.open(), build.ranks(run))

    return make


def weights(learner: Learner) -> torch.Tensor:
    """All weights, flat."""
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])
