"""The same command on several ranks of this machine, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def in_ranks(
    ranks: int, module: str, arguments: list[str], more: dict[str, str], folder: Path | None = None
) -> list[str]:
    """What each rank wrote to its output.

    Raises:
        SystemExit: one of them failed.
    """
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        port = it.getsockname()[1]
    more = more | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    more |= {"LOCAL_WORLD_SIZE": str(ranks), "PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=os.environ | more | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [child.communicate()[0] for child in started]
    if any(child.returncode for child in started):
        sys.exit(f"a rank failed: {module} {' '.join(arguments)}")
    return said
