"""Real processes that train together, over gloo. They are forked from one that has torch already, so a start is cheap."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.forked import Process


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


def in_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 300) -> None:
    """Call `work(*arguments)` on `size` ranks in this folder, as torchrun would start them; fail if one fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as said:
        ranks = [
            Process(target=_one, args=(work, arguments, rank, size, port, os.getcwd(), dict(os.environ), said))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
        for process in ranks:
            if process.is_alive():
                process.kill()
        texts = [f"rank {p.name}: {p.read_text()}" for p in sorted(Path(said).iterdir())]
        assert [p.exitcode for p in ranks] == [0] * size, "\n".join(texts)


def _one(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    size: int,
    port: int,
    folder: str,
    environment: dict[str, str],
    said: str,
) -> None:
    os.environ.update(environment)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank))
    os.environ["LOCAL_RANK"] = str(rank)
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        Path(said, str(rank)).write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)
