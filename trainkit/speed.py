"""How the machine is used: attention's kernels, CUDA graphs, threads and cores, the allocator.

Grade: reordered. Another kernel of attention and another number of threads add in another order; graphs, cores and the
allocator change no number.
"""

import ctypes
import importlib.util
import os
import platform
from typing import Literal

import torch
from torch import nn

from trainkit.config import Count, config
from trainkit.errors import UserError

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads either; what a person has set holds

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@config
class Speed:
    """`attention`: sdpa is torch's scaled_dot_product_attention; flash is the flash-attn package (Dao 2023,
    arXiv:2307.08691), where a row is one document; flex is FlexAttention (Dong et al. 2024, arXiv:2412.05496), which leaves
    out blocks that a mask of documents or a window hides; math makes whole scores by matrix products, which is faster on a
    CPU for short rows, and holds them. `cuda_graphs` has a compiled step's kernels launched at once.

    `threads` is of this process on the CPU; `affinity` gives every process of a machine cores of its own. `allocator` is
    PYTORCH_ALLOC_CONF, where the environment does not set it. With `keep_freed` memory that tensors on the CPU leave stays
    with the process: glibc would give it back, and the kernel clear it again for the next tensor. null: where products are
    in 16 bits, which is where that takes a good part of a step.
    """

    attention: Literal["sdpa", "flash", "flex", "math"] = "sdpa"
    cuda_graphs: bool = False
    threads: Count | None = None
    affinity: bool = False
    allocator: str | None = "expandable_segments:True"
    keep_freed: bool | None = None

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Refuse what this device, or this installation, cannot do.

        Raises:
            UserError: what is missing, and what to use.
        """
        if self.attention in ("flash", "flex") and device.type != "cuda":
            raise UserError(f"speed.attention={self.attention} trains on an NVIDIA GPU only: use speed.attention=sdpa")
        if self.attention == "flash" and dtype not in (torch.float16, torch.bfloat16):
            raise UserError(f"speed.attention=flash computes in 16 bits, not in {dtype}: use precision=bf16 or sdpa")
        if self.attention == "flash" and importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                "speed.attention=flash needs flash-attn: pip install flash-attn --no-build-isolation, or use sdpa"
            )
        if self.cuda_graphs and device.type != "cuda":
            raise UserError(f"speed.cuda_graphs needs an NVIDIA GPU, and this is a {device.type}: leave it out")
        if (cores := len(_cores())) < (self.threads or 1):
            raise UserError(f"speed.threads={self.threads} is more than the {cores} cores of this process")

    def begin(self, device: torch.device, dtype: torch.dtype) -> None:
        """Set this process up, before the device holds anything. `dtype` is what matrices are multiplied in."""
        if device.type == "cuda" and self.allocator and not any(name in os.environ for name in ALLOCATOR):
            os.environ[ALLOCATOR[0]] = self.allocator
        keep = dtype.itemsize == 2 if self.keep_freed is None else self.keep_freed
        if device.type == "cpu" and keep:
            keep_freed()
        if self.affinity:
            stay(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` with its attention done this way."""
        model.backbone.use_attention(self.attention)  # type: ignore[operator,union-attr]  # a backbone's own
        return model

    def describe(self, device: torch.device) -> dict[str, str]:
        """What a person should know of it before a run starts."""
        parts = [] if self.attention == "sdpa" else [f"attention by {self.attention}"]
        parts += ["CUDA graphs"] if self.cuda_graphs else []
        parts += [f"on cores {', '.join(map(str, _cores()))}"] if self.affinity else []
        held = next((f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ), "")
        parts += [held] if held and device.type == "cuda" else []
        return {"speed": "; ".join(parts)} if parts else {}


def keep_freed() -> None:
    """Let malloc take memory from its heap only, and never give it back, for as long as the process lives; where malloc is
    not glibc's, nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_MAX, 0)
        glibc.mallopt(M_TRIM_THRESHOLD, -1)


def stay(rank: int, ranks: int) -> None:
    """Keep this process, and threads that it starts from now on, on its part of the cores that it may use: `rank` of
    `ranks` of one machine. With more ranks than cores some share one."""
    cores = _cores()
    own = cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]
    os.sched_setaffinity(0, own or [cores[rank % len(cores)]])


def _cores() -> list[int]:
    """What this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
