"""`nproc=`: who is started, how they end, what a person sees of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from tests.conftest import SMALL
from tests.ranks import free_port
from trainkit import agent, logs, rendezvous, torchrun
from trainkit import run as runs
from trainkit.cli import main
from trainkit.errors import LostError, UserError
from trainkit.torchrun import Launch


def test_the_words_about_ranks_are_taken_out() -> None:
    assert torchrun.asked(["steps=3", "parallel=ddp"]) == (None, ["steps=3", "parallel=ddp"])
    assert torchrun.asked(["nproc=4", "steps=3"]) == (Launch(nproc=4), ["steps=3"])
    assert torchrun.asked(["nproc=auto", "restarts=2"]) == (Launch(nproc=None, restarts=2), [])
    several = ["nproc=1", "nodes=1:2", "rendezvous=a:29400", "address=10.0.0.1"]
    assert torchrun.asked(several)[0] == Launch(nproc=1, nodes=(1, 2), rendezvous="a:29400", address="10.0.0.1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nproc=four"], "nproc=four is not a number of ranks: use nproc=4, or nproc=auto"),
        (["nproc=0"], "nproc=0 is not a number of ranks"),
        (["nproc=-1"], "nproc=-1 is not a number of ranks"),
        (["restarts=2"], "restarts= is about ranks that are started: add nproc=N"),
        (["nproc=2", "restarts=x"], "restarts=x is not a number of restarts"),
        (["nproc=2", "nodes=2"], "nodes= and rendezvous= go together"),
        (["nproc=2", "rendezvous=a:1"], "nodes= and rendezvous= go together"),
        (["nproc=2", "nodes=2", "rendezvous=a"], "rendezvous=a is no HOST:PORT"),
        (["nproc=2", "nodes=2:1", "rendezvous=a:1"], "nodes=2:1 is not a number of machines"),
        (["nproc=2", "nodes=0", "rendezvous=a:1"], "nodes=0 is not a number of machines"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        torchrun.asked(words)


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["train", *SMALL, "name=x", *words])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path("runs").exists()
    return line


def test_mistakes_are_found_before_any_rank_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "parallel=single trains in one process" in mistake(capsys, "nproc=2")
    assert "do not divide by parallel.tp=3" in mistake(capsys, "nproc=2", "parallel=fsdp", "parallel.tp=3")
    assert "'stepz' is not a key" in mistake(capsys, "nproc=2", "stepz=3")
    monkeypatch.setattr(agent.hardware, "choose", lambda _: __import__("torch").device("cuda"))
    monkeypatch.setattr(agent.hardware, "count", lambda _: 1)
    assert "nproc=2 is more than the 1 GPU of this machine: use nproc=1" in mistake(capsys, "nproc=2", "parallel=ddp")
    monkeypatch.setenv("RANK", "0")
    assert "was started by it already" in mistake(capsys, "nproc=2", "parallel=ddp")


def test_auto_is_one_rank_a_gpu_or_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.composed([*SMALL, "name=x", "parallel=ddp"])
    assert agent._ranks_here(Launch(nproc=None), run) == len(os.sched_getaffinity(0))
    monkeypatch.setattr(agent.hardware, "choose", lambda _: __import__("torch").device("cuda"))
    monkeypatch.setattr(agent.hardware, "count", lambda _: 5)
    assert agent._ranks_here(Launch(nproc=None), run) == 5
    assert agent._ranks_here(Launch(nproc=5), run) == 5


def ends(script: str, *, nproc: int = 2, restarts: int = 0) -> int:
    """How ranks end that are shell scripts: starting them is cheap."""
    return agent.ended(Launch(nproc=nproc, restarts=restarts), nproc, "x", Path("runs/x"), ("/bin/sh", "-c", script))


@pytest.mark.parametrize("code", [0, 1, 2, 70, 74, 75])
def test_the_exit_code_of_the_ranks_is_ours(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends(f'echo "$RANK of $WORLD_SIZE" >> said; exit {code}') == code
    assert sorted(Path("said").read_text().split("\n"))[1:] == ["0 of 2", "1 of 2"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (2, 1), (70, 1), (74, 1), (75, 1)])
def test_only_what_another_start_may_mend_is_started_again(
    code: int, starts: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ends(f"echo >> said; exit {code}", nproc=1, restarts=2) == code
    assert len(Path("said").read_text()) == starts
    assert capfd.readouterr().err.count("all ranks start again, from the newest checkpoint (1 of 2)") == (starts > 1)


def test_a_killed_rank_is_named_and_all_start_again(capfd: pytest.CaptureFixture[str]) -> None:
    code = ends(
        'echo "${local_rank}$" > said; [ $TORCHELASTIC_RESTART_COUNT = 1 ] && exit 0; [ $RANK = 1 ] && kill -9 $$; sleep 30',
        restarts=1,
    )
    assert code == 0
    assert Path("said").read_text() == "$\n"  # torchrun took no word for a template of its own
    assert capfd.readouterr().err == (
        "trainkit: rank 1 was killed by SIGKILL; all ranks start again, from the newest checkpoint (1 of 1)\n"
    )


def test_the_last_words_of_a_rank_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        ends('[ $RANK = 0 ] && exit 1; mkdir -p runs/x/logs; echo "trainkit: no luck" > runs/x/logs/rank-1.log; exit 1')
        == 1
    )
    assert capfd.readouterr().err == "trainkit: rank 1 failed: no luck (runs/x/logs/rank-1.log)\n"
    file = logs.path(Path("runs/x"), 1)
    os.utime(file, (0, 0))  # of an earlier run
    assert ends("exit 1") == 1
    assert capfd.readouterr().err == ""


def test_a_machine_that_may_go_lets_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a stop of all is final, a stop of a machine among some that come and go is not."""
    made: list[bool] = []
    real = agent.Agent

    def elastic(*of: Any, **how: Any) -> agent.Agent:
        made.append(how["elastic"])
        return real(*of, **{**how, "elastic": True})

    monkeypatch.setattr(agent, "Agent", elastic)
    assert ends("[ $TORCHELASTIC_RESTART_COUNT = 1 ] && exit 0; exit 75", nproc=1, restarts=1) == 0
    assert made == [False]


def test_logs_of_every_attempt_are_kept_with_what_native_code_says() -> None:
    for _ in range(2):
        if (pid := os.fork()) == 0:
            logs.divert(Path("runs/x"), 1)
            os.write(1, b"said\n")
            os.write(2, b"complained\n")
            os._exit(0)
        os.waitpid(pid, 0)
    lines = logs.path(Path("runs/x"), 1).read_text().splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["said", "complained"] * 2


def test_the_first_rank_keeps_the_terminal_and_native_code_has_its_log() -> None:
    if (pid := os.fork()) == 0:
        with open("terminal", "wb") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        for _ in range(2):
            logs.set_aside(Path("runs/x"), 0)
            os.write(2, b"[E] complained\n")
            print("trainkit: said", file=sys.stderr)
        subprocess.run(["/bin/sh", "-c", "echo a child >&2"])
        os._exit(0)
    os.waitpid(pid, 0)
    assert Path("terminal").read_text() == "trainkit: said\n" * 2
    head, *said = logs.path(Path("runs/x"), 0).read_text().splitlines()
    assert "rank 0, process" in head
    assert said == ["[E] complained"] * 2 + ["a child"]


def test_ranks_that_torchrun_ends_for_a_lost_one_decide_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """One takes the signal for a person's, and leaves with 75."""
    stops = "trap 'exit 75' TERM; while :; do sleep 0.05; done"
    again = "echo >> said; [ $TORCHELASTIC_RESTART_COUNT = 1 ] && exit 0"
    assert ends(f"{again}; [ $RANK = 1 ] && sleep 0.5 && kill -11 $$; {stops}", restarts=1) == 0
    assert "trainkit: rank 1 was killed by SIGSEGV; all ranks" in capfd.readouterr().err
    assert ends(f"[ $RANK = 1 ] && sleep 0.5 && kill -11 $$; {stops}") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_once_and_nothing_is_started_again(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    threading.Thread(target=when, args=(ready, number)).start()
    script = "trap 'echo stop >> told; told=1' TERM; echo >> ready; while [ -z $told ]; do sleep 0.05; done; sleep 0.5; exit 75"
    assert ends(script, restarts=3) == 75
    assert Path("told").read_text() == "stop\n" * 2
    assert "trainkit" not in capfd.readouterr().err  # only the shells' own words


def test_ranks_that_know_no_signals_yet_are_stopped_as_well() -> None:
    threading.Thread(target=when, args=(ready, signal.SIGTERM)).start()
    assert ends("echo >> ready; exec sleep 30", restarts=3) == 75


def test_a_second_ctrl_c_leaves_at_once() -> None:
    threading.Thread(target=when, args=(ready, signal.SIGINT, signal.SIGINT)).start()
    begin = time.monotonic()
    assert ends("trap '' TERM; echo $$ >> ready; while :; do sleep 0.05; done") == 130
    assert time.monotonic() - begin < 20
    for pid in Path("ready").read_text().split():
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def ready() -> bool:
    return Path("ready").exists() and len(Path("ready").read_text().splitlines()) == 2


def when(condition: object, *numbers: signal.Signals) -> None:
    while not condition():  # type: ignore[operator]
        time.sleep(0.02)
    for number in numbers:
        time.sleep(0.3)
        os.kill(os.getpid(), number)


def test_a_rank_stops_when_its_torchrun_is_killed() -> None:
    rank = """
import pathlib, time
from trainkit import signals
signals.leave_at_once()
with signals.Signals(note=print):
    pathlib.Path("ready").write_text("one")
    time.sleep(30)
"""
    starter = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {rank!r}]))"
    torchrun = subprocess.Popen([sys.executable, "-c", starter], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
    while not Path("ready").exists():
        time.sleep(0.02)
    (pid,) = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    torchrun.kill()
    torchrun.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def launched(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainkit", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.timeout(900)
def test_a_run_on_two_ranks_is_started_stopped_and_resumed() -> None:
    """The real thing: three processes each time."""
    what = [*SMALL, "parallel=fsdp", "name=a", "steps=4000", "tracking=console+jsonl", "evaluation.sample_tokens=0"]
    run = launched("train", "nproc=2", *what)
    while not Path("runs/a/metrics.jsonl").exists() or not Path("runs/a/metrics.jsonl").read_text():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate()
    assert (run.returncode, err) == (75, "")
    assert out.count("mesh: dp_shard 2: 2 ranks\n") == 1
    assert out.count("run: a, 4000 steps") == 1
    assert out.count("trainkit resume a\n") == 1
    log = Path("runs/a/logs/rank-1.log").read_text()
    assert "rank 1, process" in log
    step = json.loads(Path("runs/a/metrics.jsonl").read_text().splitlines()[-1])["step"]
    run = launched("resume", "a", "nproc=2", f"stop_at={step + 2}")
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert f"run: a, step {step} to {step + 2}" in out
    lines = [json.loads(line)["step"] for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, step + 3))


def test_who_has_the_address_keeps_the_meeting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not rendezvous.is_free_here("127.0.0.1", port)
    assert rendezvous.is_free_here("127.0.0.1", port)
    assert not rendezvous.is_free_here("192.0.2.1", port)  # of documentation: nobody's
    assert not rendezvous.is_free_here("no.such.host.invalid", port)


def test_a_meeting_that_nobody_keeps_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch tries for a minute each time; here it does not."""

    def unanswered(parameters: object) -> None:
        tried.append(parameters)
        raise RendezvousConnectionError

    tried: list[object] = []
    port = free_port()
    monkeypatch.setattr(rendezvous, "get_rendezvous_handler", unanswered)
    monkeypatch.setattr(rendezvous, "JOIN_S", 0.25)
    found = Launch(nproc=1, nodes=(2, 2), rendezvous=f"no.such.host.invalid:{port}")
    with pytest.raises(LostError, match=rf"nobody answers at rendezvous=no.such.host.invalid:{port}"):
        agent.ended(found, 1, "x", Path("runs/x"), ("/bin/true",))
    assert len(tried) > 1
