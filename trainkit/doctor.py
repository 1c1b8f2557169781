"""What this machine has, what trainkit can use of it, and what to do about the rest."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainkit import atomic, hardware, versions
from trainkit.data import cache
from trainkit.errors import UserError
from trainkit.units import human_bytes

Status = Literal["ok", "warn", "bad"]
EXTRAS = {
    "torchao": "float8 on a GPU: pip install 'trainkit[quant]'",
    "flash-attn": "pip install flash-attn --no-build-isolation, where it has a wheel for this torch",
    "transformers": "Hugging Face models: pip install 'trainkit[hf]'",
    "datasets": "Hugging Face data sets: pip install 'trainkit[hf]'",
    "pyarrow": "Parquet: pip install 'trainkit[data]'",
    "zstandard": ".zst files: pip install 'trainkit[data]'",
    "matplotlib": "pictures of profiles and of `trainkit benchmark`: pip install 'trainkit[plot]'",
    "wandb": "pip install 'trainkit[wandb]'",
    "mlflow-skinny": "pip install 'trainkit[mlflow]'",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    value: str
    status: Status
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """The line as a script reads it."""
        return asdict(self)


def report(runs: Path) -> list[Finding]:
    """Everything that was found."""
    return [*_software(), *_processor(), *_accelerators(), *_disk(runs), *_extras()]


def _software() -> Iterator[Finding]:
    yield Finding("python", platform.python_version(), "ok")
    try:
        versions.check()
        yield Finding("torch", torch.__version__, "ok")
    except UserError as error:
        yield Finding("torch", torch.__version__, "bad", str(error))


def _processor() -> Iterator[Finding]:
    cpu = torch.device("cpu")
    yield Finding("cpu", hardware.name(cpu), "ok")
    for dtype in (torch.float32, torch.bfloat16):
        rate = hardware.peak_flops(cpu, dtype) / 1e9
        yield Finding(f"cpu {str(dtype).removeprefix('torch.')}", f"{rate:.0f} GFLOP/s measured", "ok")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding("memory", human_bytes(memory), "ok" if memory > 4 << 30 else "warn")


def _accelerators() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        advice = "torch is built for CUDA but finds no GPU: look at the driver with nvidia-smi" if built else ""
        yield Finding("gpu", "none", "warn" if built else "ok", advice)
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        formats = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use precision=fp16"
        fp8 = ", fp8" if (facts.major, facts.minor) >= (8, 9) else ""
        yield Finding(f"gpu {i}", f"{facts.name}, {human_bytes(facts.total_memory)}, {formats}{fp8}", "ok")
    if torch.cuda.is_available():
        missing = hardware.sensors_missing()
        value = f"cannot be read: {missing}" if missing else "power, temperature, clock"
        yield Finding("gpu readings", value, "ok", "pip install 'trainkit[gpu]'" if missing else "")
    backends = [b for b in ("nccl", "gloo", "mpi") if torch.distributed.is_backend_available(b)]
    yield Finding("distributed", ", ".join(backends) or "none", "ok" if backends else "warn")


def _disk(runs: Path) -> Iterator[Finding]:
    there = next(p for p in [runs.absolute(), *runs.absolute().parents] if p.exists())
    free = shutil.disk_usage(there).free
    low = free < 5 << 30
    yield Finding(
        "disk for runs", f"{human_bytes(free)} free at {runs}", "warn" if low else "ok", "little" if low else ""
    )
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".trainkit-") as folder:
            atomic.write(Path(folder) / "probe", b"probe")
        yield Finding("runs can be saved", "write, fsync, rename", "ok")
    except OSError as error:
        yield Finding("runs can be saved", str(error.strerror), "bad", "choose another folder with --runs")
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total
        small = size < 1 << 30
        advice = "data.workers need shared memory: docker run --shm-size=2g" if small else ""
        yield Finding("shared memory", human_bytes(size), "warn" if small else "ok", advice)
    yield Finding("cache", str(cache.folder()), "ok", "prepared text; TRAINKIT_CACHE moves it")


def _extras() -> Iterator[Finding]:
    for package, advice in EXTRAS.items():
        try:
            yield Finding(package, importlib.metadata.version(package), "ok")
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed", "ok", advice)
