"""What the device is and what it can do, measured rather than looked up."""

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from trainkit.errors import UserError


def choose(device: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in here and not (device == "cuda" and len(here) > 1):
        raise UserError(f"parallel.device={device} is not here: there is {', '.join(here)}")
    return torch.device(device)


def count(device: torch.device) -> int:
    """How many such devices there are here."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


def name(device: torch.device) -> str:
    """What the device is called, for a person."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {model}"


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that a large square matrix product reaches here: the median of the better half of
    some tries."""
    rates = product_rates(device, dtype)
    return statistics.median(sorted(rates)[len(rates) // 2 :])


def product_rates(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Floating-point operations a second of some large square matrix products, measured after a warm-up. About a third of a
    second on a CPU; two of a type that it is slow in, where one try is enough."""
    side, seconds = (8192, 0.2) if device.type == "cuda" else (1024, 0.3)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rates: list[float] = []
    end = time.perf_counter() + seconds
    a @ b
    slow = time.perf_counter() > end
    while not rates or (not slow and (time.perf_counter() < end or len(rates) < 4)):
        _wait(device)
        begin = time.perf_counter()
        a @ b
        _wait(device)
        rates.append(2 * side**3 / (time.perf_counter() - begin))
    return rates


def memory(device: torch.device) -> int:
    """Bytes that the device has in all; of a CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_in_use(device: torch.device) -> int:
    """Bytes that tensors take on a GPU; on a CPU those that the process holds."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def readings(device: torch.device) -> dict[str, float]:
    """What the device says of itself now: memory in use and, where a GPU's driver tells (NVML, through nvidia-ml-py), its
    power, temperature, clock and how busy it was. What cannot be read is left out."""
    found = {"memory_gb": memory_in_use(device) / 1e9}
    if device.type == "cuda":
        for name, (read, unit) in _SENSORS.items():
            with contextlib.suppress(*_unreadable()):
                found[name] = read(device) * unit
    return found


def sensors_missing() -> str | None:
    """Why a GPU's driver cannot be asked for readings; None where it can."""
    try:
        torch.cuda.temperature()
    except _unreadable() as error:
        return str(error)
    return None


@cache
def _unreadable() -> tuple[type[Exception], ...]:
    """What torch raises where a reading cannot be had: no nvidia-ml-py, no driver, or a card that does not have it."""
    try:
        from pynvml import NVMLError
    except ModuleNotFoundError:
        return ModuleNotFoundError, RuntimeError
    return ModuleNotFoundError, RuntimeError, NVMLError


_SENSORS: dict[str, tuple[Callable[[torch.device], float], float]] = {
    "gpu_power_w": (torch.cuda.power_draw, 1e-3),
    "gpu_temperature_c": (torch.cuda.temperature, 1.0),
    "gpu_clock_mhz": (torch.cuda.clock_rate, 1.0),
    "gpu_busy": (torch.cuda.utilization, 1e-2),
}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
