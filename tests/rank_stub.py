"""`python -S -I rank_stub.py SOCKET WORDS...` is `trainkit WORDS...` at no cost: tests/rank_server.py forks a process that has
torch already, with this one's environment, folder and output. This one ends as that one does; when this one is killed, so is
that one."""

import json
import os
import signal
import socket
import sys

link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
answers = link.makefile()
job = {"words": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
socket.send_fds(link, [json.dumps(job).encode() + b"\n"], [1, 2])
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline() or -signal.SIGKILL)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
