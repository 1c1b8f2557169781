"""Two "machines": network namespaces with addresses of their own and one wire between them, which can be cut. It takes root."""

import os
import subprocess
from types import TracebackType

NAMES, ADDRESSES, WIRE = ("a", "b"), ("10.77.0.1", "10.77.0.2"), "wire"
NOBODY = "02:00:00:00:00:99"


class Network:
    """Inside `with`, both are there; `inside(0)` are the words that bring a process into the first one."""

    def __init__(self) -> None:
        self.names = [f"trainkit-{os.getpid()}-{name}" for name in NAMES]

    def __enter__(self) -> "Network":
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip(
                "link",
                "add",
                WIRE,
                "netns",
                self.names[0],
                "type",
                "veth",
                "peer",
                "name",
                WIRE,
                "netns",
                self.names[1],
            )
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", WIRE)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", WIRE, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def inside(self, machine: int) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.names[machine])

    def cut(self) -> None:
        """Both keep their own addresses, and what one sends reaches nobody, as behind a dead switch."""
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neighbour", "replace", other, "lladdr", NOBODY, "dev", WIRE, "nud", "permanent")

    def mend(self) -> None:
        for name, other in zip(self.names, reversed(ADDRESSES), strict=True):
            _ip("-n", name, "neighbour", "delete", other, "dev", WIRE)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
