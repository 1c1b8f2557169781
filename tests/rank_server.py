"""trainkit for drills, forked from a process that has torch already, so that starting one takes a tenth of a second. All else
is as it is: torchrun's agent, the ranks that it starts, their signals and exit codes.

`Server` is for scripts and tests; run as a program, it is that process.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STUB = ROOT / "tests" / "rank_stub.py"
STOPPING = (signal.SIGINT, signal.SIGTERM)


class Server:
    """Inside `with`, `start(...)` is `trainkit WORDS...`, and the file `program` in `folder` is trainkit for a script.
    `inside` goes before the process: the words that bring it into a namespace."""

    def __init__(self, folder: Path, name: str = "server", inside: tuple[str, ...] = ()) -> None:
        self._folder, self._inside = folder, inside
        self._socket, self.program = folder / f"{name}.socket", folder / f"{name}.trainkit"

    def __enter__(self) -> "Server":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as trainkit sets it before it imports torch
        self._process = subprocess.Popen(
            [*self._inside, sys.executable, "-m", "tests.rank_server", str(self._socket)],
            cwd=self._folder,
            env=environment,
        )
        while not self._socket.exists():
            assert self._process.poll() is None
            time.sleep(0.05)
        self.program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I {STUB} {self._socket} "$@"\n')
        self.program.chmod(0o755)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.unlink()

    def start(self, words: list[str], said: Path) -> subprocess.Popen[bytes]:
        """In the folder of the file `said`, to which is added what it prints, and by whose name `kill_all` knows it."""
        environment = {**os.environ, "DRILL": str(said)}
        with said.open("ab") as out:
            return subprocess.Popen(
                [str(self.program), *words], cwd=said.parent, stdout=out, stderr=out, env=environment
            )


def kill_all(said: Path) -> None:
    """SIGKILL for all that was started with the file `said`: the agent first, then its ranks."""
    for file in sorted(Path("/proc").glob("[0-9]*/environ"), key=lambda it: int(it.parent.name)):
        with contextlib.suppress(OSError):
            if f"DRILL={said}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def work(job: dict[str, Any], descriptors: list[int]) -> None:
    """In a child: be what was asked for."""
    from trainkit import agent, signals
    from trainkit.cli import main

    signals.leave_at_once()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    os.setsid()
    for number, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    agent.PROGRAM = (sys.executable, "-S", "-I", str(STUB), sys.argv[1])
    code: Any = 1
    try:
        main(job["words"])
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(link: socket.socket, listener: socket.socket) -> None:
    """Fork what is asked for, say its pid and how it ended, and kill it when nobody listens any more."""
    text, descriptors, _, _ = socket.recv_fds(link, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += link.recv(1 << 20)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until the child can answer them as trainkit does
    if (pid := os.fork()) == 0:
        listener.close()
        link.close()
        work(json.loads(text), list(descriptors))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    for descriptor in descriptors:
        os.close(descriptor)
    threading.Thread(target=look_after, args=(pid, link), daemon=True).start()


def look_after(pid: int, link: socket.socket) -> None:
    with link:
        link.sendall(f"{pid}\n".encode())
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if select.select([link], [], [], 0.02)[0]:  # the stub was killed
                os.kill(pid, signal.SIGKILL)
        if not select.select([link], [], [], 0)[0]:
            link.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    import tests.warm  # noqa: F401  # so that children have it
    import trainkit.agent  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen(64)
        while True:
            link, _ = listener.accept()
            serve(link, listener)


if __name__ == "__main__":
    main()
