"""How much this process grew at most, as the operating system sees it: allocators' slack and libraries included."""

import contextlib
import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakResident:
    """The growth of the resident memory from here on."""

    def __init__(self) -> None:
        with contextlib.suppress(
            OSError
        ):  # not Linux, or a container that forbids it: the growth is then a lower bound
            CLEAR.write_text("5")  # proc(5): the peak begins anew at what is resident now
        self._before = _peak()

    def growth(self) -> int:
        """Bytes that were resident at most, beyond what was at the start."""
        return max(0, _peak() - self._before)


def _peak() -> int:
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):  # getrusage would begin with the peak of the process that started this one
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
