"""Ranks that are not the same: other versions, another config, other data."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import agreement, build, versions
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.parallel import differing
from trainkit.parallel.meeting import agree, meeting


def test_what_differs_is_said_with_its_ranks() -> None:
    same = {"torch": "2.13.0", "steps": "6"}
    assert differing([same] * 5) is None
    assert differing([same, same, {**same, "torch": "2.12.1"}, same]) == (
        "the ranks are not the same: torch is 2.13.0 on ranks 0-1, 3, 2.12.1 on rank 2: start all of them alike"
    )
    assert differing([same, {"torch": "2.13.0"}]) == (
        "the ranks are not the same: steps is 6 on rank 0, absent on rank 1: start all of them alike"
    )
    many = differing([{str(i): "a" for i in range(6)}, {str(i): "b" for i in range(6)}])
    assert many is not None
    assert "2 is a on rank 0, b on rank 1; and 3 more differences: start" in many


def test_every_attempt_meets_in_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store over restarts: what the first attempt left there must not be read by the second."""
    kept = dist.HashStore()
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: kept)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    meeting().set("address", "of the dead")
    assert meeting().check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not meeting().check(["address"])


def test_the_verdict_of_the_first_rank_is_that_of_all() -> None:
    store = dist.HashStore()
    store.set("facts-1", '{"torch": "2"}')
    store.set("heard-1", "")
    with pytest.raises(UserError, match="torch is 1 on rank 0, 2 on rank 1"):
        agree(store, 0, 2, {"torch": "1"})
    with pytest.raises(UserError, match="torch is 1 on rank 0, 2 on rank 1"):
        agree(store, 1, 2, {"torch": "2"})


def test_the_first_rank_leaves_when_all_have_heard() -> None:
    """It may keep the store."""
    store = dist.HashStore()
    store.set("facts-1", '{"torch": "2"}')
    left = threading.Event()

    def first() -> None:
        with pytest.raises(UserError):
            agree(store, 0, 2, {"torch": "1"})
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert not left.wait(0.5)
    with pytest.raises(UserError):
        agree(store, 1, 2, {"torch": "2"})
    thread.join()
    assert left.is_set()


@pytest.mark.parametrize(("rank", "agents", "keeps"), [("0", "True", False), ("0", None, True), ("1", None, False)])
def test_the_first_rank_keeps_the_store_where_no_agent_does(
    monkeypatch: pytest.MonkeyPatch, rank: str, agents: str | None, keeps: bool
) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dist, "TCPStore", lambda *where, **how: (made.append((where, how)), dist.HashStore())[1])
    for name, value in {"MASTER_ADDR": "host", "MASTER_PORT": "7", "RANK": rank}.items():
        monkeypatch.setenv(name, value)
    if agents:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agents)
    meeting()
    ((where, how),) = made
    assert (where, how["is_master"]) == (("host", 7), keeps)


def test_another_tokenizer_over_the_same_text_is_other_data() -> None:
    said: list[Any] = []

    def both(own: dict[str, str]) -> list[dict[str, str]]:
        said.append(own)
        return [own]

    for name in ("bpe", "bytes"):
        corpus = SimpleNamespace(fingerprint="f" * 40, tokenizer=SimpleNamespace(identity={"name": name}))
        agreement.refuse_other_data(corpus, SimpleNamespace(host=SimpleNamespace(gather=both)))  # type: ignore[arg-type]
    assert said[0]["data"] == said[1]["data"]
    assert "tokenizer is" in str(differing(said))


def starts(said: str, *words: str) -> None:
    with pytest.raises(UserError, match=said), build.trainer(composed(*words), Path("runs/x")):
        pass
    assert not dist.is_initialized() or "data" in said  # refused before ranks are joined, where it can be


def composed(*words: str) -> runs.Run:
    return runs.composed([*SMALL, "name=x", "parallel=ddp", *words])


def second() -> bool:
    return os.environ["RANK"] == "1"


def other_versions() -> None:
    if second():
        here = versions.installed()
        versions.installed = lambda: {**here, "torch": "2.0.0"}  # type: ignore[assignment]
    starts(r"the ranks are not the same: torch is \S+ on rank 0, 2.0.0 on rank 1: start all of them alike")


def other_configs() -> None:
    more = ["optimizer.lr=0.5", "parallel=fsdp", "parallel.device=cpu", "tracking=console"] if second() else []
    starts(
        r"optimizer.lr is \S+ on rank 0, 0.5 on rank 1; parallel.kind is ddp on rank 0, fsdp on rank 1: start", *more
    )


def other_sizes() -> None:
    """Which do not divide on one of them: it must not leave by itself, and let the other wait."""
    starts("parallel.tp is None on rank 0, 3 on rank 1", *(["parallel.tp=3"] if second() else []))


def other_data() -> None:
    if second():
        Path("elsewhere").mkdir()
        Path("elsewhere/a.txt").write_text("quite another text, and a long one. " * 60)
    starts(r"data is \w{12} on rank 0, \w{12} on rank 1", *(["data.path=elsewhere"] if second() else []))


@pytest.mark.parametrize("work", [other_versions, other_configs, other_sizes, other_data])
def test_ranks_that_are_not_the_same_are_refused(work: object) -> None:
    in_ranks(2, work, timeout=120)  # type: ignore[arg-type]
    assert not Path("runs").exists() or work is other_data
