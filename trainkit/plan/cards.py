"""What a GPU holds and how fast it is, by data sheet, or this machine's CPU, by measurement.

Rates are dense, without sparsity, with float32 accumulation; memory is the data sheet's, in 10⁹ bytes, which is up to 7 %
less than the driver finds. Sources: NVIDIA's data sheets and architecture papers of each card.
"""

import os
import re
import time
from dataclasses import dataclass, replace

import torch

from trainkit import hardware
from trainkit.errors import UserError, nearest
from trainkit.plan.kernels import Device, Work
from trainkit.plan.world import Line

LAUNCH_S = 5e-6  # a kernel's launch, which hides behind the one before where that takes longer
EFFICIENCY = {"cuda": 0.65, "cpu": 0.9}  # share of the peak that a large matrix product reaches; a CPU's is measured
HOST_MEMORY = 50.0  # GB/s that a host reads and writes of its own, as an optimizer's step there does
STREAMING = 0.8  # share of the bandwidth that a pointwise kernel reaches
WIRE = 0.8  # share of a link's or an adapter's bandwidth that large collectives reach
NEAR_S, FAR_S = 1e-6, 5e-6  # a turn of a ring takes at the least, within a machine and between machines
# beside what the allocator counts: CUDA's context and kernels, what the allocator cannot use because it lies in pieces
CONTEXT, FRAGMENTS, NCCL = 600 << 20, 0.03, 400 << 20
WORKSPACES = 64 << 20  # cuBLAS's, of the thread that runs forward and the one that runs backward


@dataclass(frozen=True)
class Card:
    """TFLOP/s by dtype, memory in GB, GB/s of memory, of the link to other cards of the machine, of that to the host, and of
    the adapter to other machines that goes with each card, one way."""

    name: str
    memory: float
    bf16: float
    fp16: float
    fp8: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float
    host: float
    network: float = 3.0
    cuda: bool = True

    @property
    def bytes(self) -> int:
        """What it holds."""
        return int(self.memory * 1e9)

    def device(self) -> Device:
        """What is traced for it."""
        if self.cuda:
            return Device(torch.device("cpu", 1), cuda=True, unit=512)
        return Device(torch.device("cpu"), threads=torch.get_num_threads())

    def rate(self, dtype: torch.dtype, tf32: bool) -> float:
        """Floating-point operations a second of matrix products."""
        rates = {torch.bfloat16: self.bf16, torch.float16: self.fp16, torch.float64: self.fp32 / 2}
        eight = self.fp8 if dtype.itemsize == 1 else None
        return 1e12 * (eight or rates.get(dtype) or (self.tf32 if tf32 else self.fp32))

    def seconds(self, work: list[Work], *, efficiency: float, tf32: bool) -> float:
        """A roofline (Williams et al. 2009), op after op: each takes as long as its arithmetic or its memory traffic,
        whichever is more. Transfers that wait for nobody, and what ranks send each other beside layers, go beside it."""
        own = beside = sent = 0.0
        for w in work:
            arithmetic = w.flops / (self.rate(w.dtype, tf32) * efficiency)
            traffic = w.bytes / (self.bandwidth * 1e9 * STREAMING)
            moved = w.moved / (self.host * 1e9)
            here = max(arithmetic, traffic, LAUNCH_S if self.cuda and not (w.on_host or w.line) else 0.0)
            own += w.times * (here + w.on_host / (HOST_MEMORY * 1e9) + (0.0 if w.beside else moved))
            beside += w.times * moved if w.beside else 0.0
            if w.line is not None:
                talked = w.times * self.talked(w.line, w.sent, w.turns)
                sent += 0.0 if w.line.waited_for else talked
                own += talked if w.line.waited_for else 0.0
        return max(own, beside, sent)

    def talked(self, line: Line, sent: float, turns: int) -> float:
        """Seconds in which each rank of a line sends so many bytes, in so many turns of a ring. Between machines every one of a
        machine's ranks in the line brings its own adapter."""
        if line.machines == 1:
            return sent / (self.link * 1e9 * WIRE) + turns * NEAR_S
        rate = min(self.link, self.network * line.near) * 1e9 * WIRE
        far = turns * line.machines / line.size
        return sent / rate + far * FAR_S + (turns - far) * NEAR_S

    def needed(self, allocated: int, ranks: int) -> int:
        """Bytes of the card that a peak of so many allocated ones takes. On a CPU they are the same."""
        if not self.cuda:
            return allocated
        return int((allocated + WORKSPACES) * (1 + FRAGMENTS)) + CONTEXT + (NCCL if ranks > 1 else 0)


# name, memory GB, bf16, fp16, fp8, tf32, fp32 TFLOP/s, memory GB/s, link GB/s, host GB/s, network GB/s: of the systems that the
# card's maker builds (DGX, HGX), where there are some, else 25 Gb/s a card
CARDS = {
    card.name: card
    for card in (
        Card("b200", 180, 2250, 2250, 4500, 1125, 75, 7700, 900, 55, 50),
        Card("h200", 141, 989, 989, 1979, 494, 67, 4800, 450, 55, 50),
        Card("h100", 80, 989, 989, 1979, 494, 67, 3350, 450, 55, 50),
        Card("h100-pcie", 80, 756, 756, 1513, 378, 51, 2000, 55, 55, 25),
        Card("a100-80", 80, 312, 312, 312, 156, 19.5, 2039, 300, 25, 25),
        Card("a100-40", 40, 312, 312, 312, 156, 19.5, 1555, 300, 25, 25),
        Card("l40s", 48, 362, 362, 733, 183, 91.6, 864, 25, 25),
        Card("rtx6000-ada", 48, 364, 364, 728, 182, 91.1, 960, 25, 25),
        Card("a6000", 48, 155, 155, 155, 77.4, 38.7, 768, 25, 25),
        Card("rtx5090", 32, 209, 209, 419, 105, 105, 1792, 50, 50),
        Card("rtx4090", 24, 165, 165, 330, 82.6, 82.6, 1008, 25, 25),
        Card("rtx3090", 24, 71, 71, 71, 35.6, 35.6, 936, 25, 25),
        Card("a10g", 24, 70, 70, 70, 35, 31.5, 600, 25, 25),
        Card("l4", 24, 121, 121, 242, 60, 30.3, 300, 25, 25),
        Card("rtx4080", 16, 97.5, 97.5, 195, 48.7, 48.7, 717, 25, 25),
        Card("t4", 16, 8.1, 65, 8.1, 8.1, 8.1, 320, 12, 12),
        Card("v100-32", 32, 15.7, 125, 15.7, 15.7, 15.7, 900, 150, 12, 6),
        Card("v100-16", 16, 15.7, 125, 15.7, 15.7, 15.7, 900, 150, 12, 6),
    )
}
COMMON = ("b200", "h200", "h100", "a100-40", "l40s", "rtx5090", "rtx4090", "rtx4080")  # that a size stands for
_ALSO = {"a100": "a100-80", "v100": "v100-16", "4090": "rtx4090", "3090": "rtx3090", "5090": "rtx5090"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(gb|gib|g)", re.IGNORECASE)


def find(gpu: str | None) -> Card:
    """The card of that name, one of that much memory (`24GB`), this machine's `cpu`; None is what is here.

    Raises:
        UserError: there is none of that name.
    """
    name = (gpu or ("here" if torch.cuda.is_available() else "cpu")).lower().replace("_", "-")
    if name == "cpu":
        return _cpu()
    if name == "here":
        facts = torch.cuda.get_device_properties(0)
        return replace(_sized(facts.total_memory / 1e9), name=facts.name, memory=facts.total_memory / 1e9)
    if size := _SIZE.fullmatch(name):
        return replace(sized := _of_size(size), name=f"{gpu} ({sized.name}'s speed)")
    if (_ALSO.get(name, name)) not in CARDS:
        raise UserError(f"--gpu {gpu} is no card and no size such as 24GB{nearest(name, [*CARDS, *_ALSO, 'cpu'])}")
    return CARDS[_ALSO.get(name, name)]


def _of_size(size: "re.Match[str]") -> Card:
    memory = float(size[1]) * ((1 << 30) / 1e9 if size[2].lower() == "gib" else 1.0)
    if memory < 1:
        raise UserError(f"--gpu {size[0]} is less than any GPU has: give GB, such as --gpu 24GB")
    return _sized(memory)


def _sized(memory: float) -> Card:
    common = min((CARDS[name] for name in COMMON), key=lambda card: abs(card.memory - memory))
    return replace(common, memory=memory)


def _cpu() -> Card:
    cpu = torch.device("cpu")
    fp32, bf16 = (hardware.peak_flops(cpu, dtype) / 1e12 for dtype in (torch.float32, torch.bfloat16))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    copied = _copied()
    return Card("cpu", memory, bf16, fp32, fp32, fp32, fp32, copied, 10, copied, cuda=False)


def _copied() -> float:
    """GB/s of memory that a copy reads and writes here."""
    source, target = torch.ones(1 << 24), torch.ones(1 << 24)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(seconds) / 1e9
