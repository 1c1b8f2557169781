"""How much memory there is, how much a piece of work takes, and whether an error says that there was too little."""

import os
import resource
from pathlib import Path

import torch

_SAID = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc", "ALLOC_FAILED")
_CGROUPS = {  # folder: limit, use, and the part of the use that is files, which give way
    Path("/sys/fs/cgroup"): ("memory.max", "memory.current", "inactive_file"),
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _SAID)


class Room:
    """The memory that is free for a rank's step when this is made, and the most that was taken of it since `begin`.

    On a GPU: what the driver has left and torch has cached, and torch's own count of allocated bytes. On a CPU there is no
    limit that is met with an error one can count on, the kernel rather kills: free is what the kernel says is available,
    at most what the control group and the process's own limit leave, shared by the ranks of this machine; taken is the
    process's resident memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self.free = _free_on_gpu(device) if self._cuda else _free_on_host()
        self._before = torch.cuda.memory_allocated(device) if self._cuda else _status("VmRSS")

    def begin(self) -> None:
        """Forget the most that was taken."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            clear = Path("/proc/self/clear_refs")
            if clear.exists() and os.access(clear, os.W_OK):
                clear.write_text("5")  # where it cannot be forgotten the most of the whole process counts

    def taken(self) -> int:
        """The most bytes taken since `begin`, beyond what was taken when this was made."""
        most = torch.cuda.max_memory_allocated(self._device) if self._cuda else _status("VmHWM")
        return max(most - self._before, 0)


def _free_on_gpu(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + torch.cuda.memory_reserved(device) - allocated, share - allocated)


def _free_on_host() -> int:
    known = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        known.append(int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) << 10)
    else:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    for folder, (limit, used, files) in _CGROUPS.items():
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            known.append(int(most) - int((folder / used).read_text()) + int(stat.get(files, 0)))
    shared = min(known) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    return shared if own == resource.RLIM_INFINITY else min(shared, own - _status("VmSize"))


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; without one, the most that was ever resident."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split(f"{name}:")[1].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
