"""Bytes from the device to host memory and back, beside the computation.

`send` begins a copy to the host, `settle` lets go of what has arrived there, `fetch` begins the copy back and `wait` gives it.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from trainkit.stalls import Stalls


class HostLanes:
    """Where the device is the host: nothing is copied, and nothing is waited for."""

    def serve(self, device: torch.device) -> bool:
        """Whether these are the lanes of `device`."""
        return device.type == "cpu"

    def send(self, storage: UntypedStorage) -> Any:
        """Begin to move a storage out. What comes back is for `fetch`."""
        return storage

    def settle(self, keep: int) -> None:
        """A block is done: all but the newest `keep` blocks' storages are let go of, once they are out."""

    def fetch(self, sent: Any) -> Any:
        """Begin to bring one back. What comes back is for `wait`."""
        return sent

    def wait(self, coming: Any) -> UntypedStorage:
        """The storage on the device, whole for whatever is computed from here on."""
        storage: UntypedStorage = coming
        return storage

    def waited_s(self) -> float:
        """Seconds that the computation stood still for copies since the last call."""
        return 0.0


class CudaLanes(HostLanes):
    """One stream out and one in, through pinned memory, which torch keeps for the next step.

    A storage that is leaving stays referenced until the computation has been told to wait for its copy, so that its
    memory is nobody else's before; two blocks may be leaving at once. One that is coming lies in memory of the computing
    stream, for which the copy waits first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        self._block: list[Tensor] = []
        self._stalls = Stalls(device)

    def serve(self, device: torch.device) -> bool:
        return device == self._device

    def send(self, storage: UntypedStorage) -> tuple[Tensor, torch.cuda.Event]:
        on_device = _bytes(storage, self._device)
        on_host = torch.empty(len(on_device), dtype=torch.uint8, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            on_host.copy_(on_device, non_blocking=True)
        self._block.append(on_device)
        return on_host, self._out.record_event()

    def settle(self, keep: int) -> None:
        if self._block:
            self._leaving.append((self._out.record_event(), self._block))
            self._block = []
        while len(self._leaving) > keep:
            self._stall_for(self._leaving[0][0])
            self._leaving.popleft()

    def fetch(self, sent: tuple[Tensor, torch.cuda.Event]) -> tuple[Tensor, torch.cuda.Event]:
        on_host, left = sent
        on_device = torch.empty(len(on_host), dtype=torch.uint8, device=self._device)
        self._in.wait_stream(torch.cuda.current_stream(self._device))  # its memory may have been another's until here
        self._in.wait_event(left)
        with torch.cuda.stream(self._in):
            on_device.copy_(on_host, non_blocking=True)
        return on_device, self._in.record_event()

    def wait(self, coming: tuple[Tensor, torch.cuda.Event]) -> UntypedStorage:
        self._stall_for(coming[1])
        return coming[0].untyped_storage()

    def waited_s(self) -> float:
        return self._stalls.seconds()

    def _stall_for(self, event: torch.cuda.Event) -> None:
        begin = self._stalls.now()
        torch.cuda.current_stream(self._device).wait_event(event)
        self._stalls.add(begin)


def lanes(device: torch.device) -> HostLanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else HostLanes()


def _bytes(storage: UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
