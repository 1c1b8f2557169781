"""Where torchrun's agents of several machines meet: torch's store (c10d), which one of them keeps."""

import socket
import time
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainkit.errors import LostError

JOIN_S = 600.0  # for the machine that keeps it
AGAIN_S = 0.1


def meeting(parameters: RendezvousParameters) -> Any:
    """torch's handler. The machine whose address the endpoint is keeps the store; the others wait for that one to come.

    Raises:
        LostError: it does not come.
    """
    host, _, port = parameters.endpoint.rpartition(":")
    keeps, end = is_free_here(host, int(port)), time.monotonic() + JOIN_S
    while True:
        parameters.config["is_host"] = (
            keeps  # torch would look at this machine's name, which need not lead to its address
        )
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError as error:
            if not keeps and time.monotonic() > end:
                raise LostError(
                    f"nobody answers at rendezvous={parameters.endpoint}: it has to be the address of one of these machines, "
                    f"and its port open"
                ) from error
            keeps = False  # another process of this machine was faster
            time.sleep(AGAIN_S)


def is_free_here(host: str, port: int) -> bool:
    """Whether that is an address of this machine, and nobody has the port yet."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as it:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            it.bind(address)
    except OSError:
        return False
    return True
