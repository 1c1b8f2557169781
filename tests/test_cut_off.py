"""A machine whose wire is cut: the others are not gone, they only do not answer. It has to leave soon, and to say why."""

import importlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from tests.ranks import free_port
from tests.wire import Wire
from trainkit import agent, errors
from trainkit.parallel import LostRankError, Ranks, roll
from trainkit.parallel.meeting import agree, meeting
from trainkit.parallel.roll import Roll
from trainkit.torchrun import Launch

MEETING = importlib.import_module("trainkit.parallel.meeting")  # its package has a function of that name


@pytest.fixture(autouse=True)
def no_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's timers go on until their process ends, which here is that of other tests."""
    monkeypatch.setattr(DynamicRendezvousHandler, "_start_heartbeats", lambda _: None)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """The wire to a store that another machine keeps."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with Wire(store.port) as it:
        yield it


def ends(wire: Wire, script: str, *, nproc: int = 1, restarts: int = 0) -> int:
    """How ranks end that are shell scripts. Their torchrun's store is at the other end of the wire, which is cut when one
    of them has made the file `ready`; then there is the file `cut`."""

    def cut() -> None:
        while not Path("ready").exists():
            time.sleep(0.02)
        wire.cut()
        Path("cut").touch()

    threading.Thread(target=cut, daemon=True).start()
    launch = Launch(nproc=nproc, restarts=restarts, rendezvous=f"127.0.0.1:{wire.port}", address="127.0.0.1")
    return agent.ended(launch, nproc, "x", Path("runs/x"), ("/bin/sh", "-c", script))


CUT = "touch ready; while [ ! -e cut ]; do sleep 0.02; done"


def test_ranks_that_failed_behind_a_cut_wire_end_their_machine(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's agent waits two minutes for its store. One of the ranks waits for ever."""
    monkeypatch.setattr(agent, "DEAF_S", 1.5)
    begin = time.monotonic()
    with pytest.raises(errors.LostError) as said:
        ends(
            wire,
            f"{CUT}; [ $RANK = 0 ] && echo $$ > waits && exec sleep 300; sleep 2; mkdir -p runs/x/logs; "
            "echo 'trainkit: rank 0 does not answer' > runs/x/logs/rank-1.log; exit 1",
            nproc=2,
            restarts=3,
        )
    assert str(said.value) == (
        f"rendezvous=127.0.0.1:{wire.port} does not answer any more, so its machine is gone, or the way there: "
        "rank 1 failed: rank 0 does not answer (runs/x/logs/rank-1.log)"
    )
    assert 1.5 < time.monotonic() - begin < 20
    pid = Path("waits").read_text().strip()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_ranks_that_are_at_work_outlast_a_short_cut(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "DEAF_S", 0.3)

    def mended() -> None:
        while not Path("done").exists():
            time.sleep(0.02)
        time.sleep(1.0)
        wire.mend()

    threading.Thread(target=mended, daemon=True).start()
    assert ends(wire, f"{CUT}; sleep 1.5; [ $RANK = 0 ] && touch done; exit 0", nproc=2) == 0


def test_ranks_that_start_again_for_another_machine_are_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """One leaves at once, and one takes its time, longer than a store may."""
    monkeypatch.setattr(agent, "DEAF_S", 0.4)
    waiting = DynamicRendezvousHandler.num_nodes_waiting

    def another(handler: Any) -> int:
        if Path("came").exists() or not Path("ready-0").exists() or not Path("ready-1").exists():
            return waiting(handler)
        Path("came").touch()
        return 1

    monkeypatch.setattr(DynamicRendezvousHandler, "num_nodes_waiting", another)
    script = (
        "[ -e came ] && exit 0; trap '[ $RANK = 1 ] || sleep 1.5; exit 75' TERM; touch ready-$RANK; "
        "while :; do sleep 0.02; done"
    )
    assert agent.ended(Launch(nproc=2), 2, "x", Path("runs/x"), ("/bin/sh", "-c", script)) == 0


def test_torchruns_thread_may_turn_to_its_ranks_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    class Turning(agent.Agent):
        _seen = itertools.cycle([0.0, None])
        _looked = property(lambda self: next(self._seen), lambda self, value: None)

    monkeypatch.setattr(agent, "Agent", Turning)
    assert agent.ended(Launch(nproc=1), 1, "x", Path("runs/x"), ("/bin/sh", "-c", "sleep 0.5")) == 0


def test_nobody_waits_to_say_good_bye_to_a_store_that_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "DEAF_S", 0.5)
    monkeypatch.setattr(DynamicRendezvousHandler, "shutdown", lambda _: time.sleep(60))
    begin = time.monotonic()
    assert agent.ended(Launch(nproc=1), 1, "x", Path("runs/x"), ("/bin/sh", "-c", "exit 70")) == 70
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("code", "said"), [(75, None), (70, None), (1, "rank 1 failed: no luck"), (0, errors.AGAIN), (-9, "SIGKILL")]
)
def test_ranks_that_end_as_the_store_goes_have_said_why(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, code: int, said: str | None
) -> None:
    """The machine that keeps it may be done a moment earlier."""
    monkeypatch.setattr(wire, "cut", wire.close)
    monkeypatch.setattr(agent, "LEAVE_S", 3.0)
    script = f"{CUT}; sleep 1; mkdir -p runs/x/logs; echo 'no luck' > runs/x/logs/rank-1.log; "
    script += f"exit {code}" if code >= 0 else f"kill {code} $$"
    if said is None:
        assert ends(wire, script, nproc=2) == code
    else:
        with pytest.raises(errors.LostError, match=f"rendezvous=.* does not answer any more.*{said}"):
            ends(wire, script, nproc=2)


def test_other_ranks_are_asked_for_a_bounded_time(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll, "ANSWER_S", 0.4)
    near = dist.TCPStore("127.0.0.1", wire.port, is_master=False, wait_for_workers=False)
    here = Ranks(torch.device("cpu"), 1, 3, roll=Roll(near, 1, 3))
    assert here.absent() == "ranks 0, 2 do not answer any more"
    others = [Roll(near, rank, 3) for rank in (0, 2)]
    assert (here.absent(), here.lost(RuntimeError("gloo"))) == ("", None)
    del others
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    wire.cut()
    begin = time.monotonic()
    assert here.absent() == "the machine of rank 0 (10.0.0.1) does not answer any more"
    assert time.monotonic() - begin < 5
    assert str(here.lost(RuntimeError("gloo"))) == (
        "the machine of rank 0 (10.0.0.1) does not answer any more: killed, or its machine or network is gone; "
        "the same command, on each machine, goes on from the newest checkpoint"
    )
    assert here.lost(errors.UserError("a mistake")) is None
    monkeypatch.setenv("GROUP_RANK", "0")
    assert here.absent() == "this machine's own address (10.0.0.1) does not answer any more"
    monkeypatch.delenv("GROUP_RANK")
    wire.close()
    assert "the machine of rank 0" in here.absent()  # its store is gone


def test_what_to_do_is_not_said_where_torchrun_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert errors.again() == f"; {errors.AGAIN}"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert errors.again() == ""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert errors.again() == f"; {errors.AGAIN}"


def test_who_waits_for_ranks_to_come_hears_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's SIGTERM, when one of them was killed: in C++ it would be heard only when the wait is over."""

    def stop(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(MEETING, "TIMEOUT", timedelta(seconds=20))
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        begin = time.monotonic()
        with pytest.raises(InterruptedError):
            agree(meeting(), 0, 2, {})
        assert time.monotonic() - begin < 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MEETING, "TIMEOUT", timedelta(seconds=0.3))
    store = dist.HashStore()
    store.set("facts-1", "{}")
    with pytest.raises(LostRankError, match="rank 2 did not come to where the ranks meet; the same command"):
        agree(store, 0, 3, {})
    with pytest.raises(LostRankError, match="rank 0 did not come"):
        agree(store, 1, 3, {})


def test_torch_is_asked_to_be_quiet_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainkit import torchrun

    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    torchrun.asked(["steps=3"])
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ
    torchrun.asked(["nproc=2"])
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")  # a person's
    torchrun.asked(["nproc=2"])
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "INFO"
