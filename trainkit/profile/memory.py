"""`profile=memory`: the bytes of each category in each phase of some steps, as tables and as a picture."""

import csv
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from trainkit.config import Count, Fraction, Natural, config
from trainkit.errors import UserError
from trainkit.profile.allocations import CATEGORIES, Allocations, Block
from trainkit.profile.blocks import alive
from trainkit.profile.phases import OUTSIDE
from trainkit.units import human_bytes

STEPS = "steps"
HISTORY = 200_000  # allocations and frees that a CUDA snapshot remembers


@config
class MemoryProfile:
    """Let `after` steps of a process pass, then look at `steps`. Allocations of more than `spikes` of the peak are listed
    with what made them. `picture` needs matplotlib."""

    after: Natural = 2
    steps: Count = 3
    spikes: Fraction = 0.02
    picture: bool = True

    @property
    def first(self) -> int:
        """The first step that is looked at, from 1."""
        return self.after + 1

    @property
    def last(self) -> int:
        """The last one."""
        return self.after + self.steps

    def check(self) -> None:
        """Raise UserError when a picture is wanted and cannot be drawn."""
        if self.picture and importlib.util.find_spec("matplotlib") is None:
            raise UserError(
                "profile=memory draws with matplotlib, which is not installed: pip install 'trainkit[plot]', "
                "or profile.memory.picture=false for the tables alone"
            )

    def build(self, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "MemoryWatch":
        """A watch that writes into `folder`."""
        return MemoryWatch(self, folder, model, optimizer)


class MemoryWatch:
    """Writes after each thing that it looked at, so that what was seen is there when the run is killed."""

    def __init__(
        self, config_: MemoryProfile, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.first, self.last = config_.first, config_.last
        self._config, self._folder = config_, folder
        self._model, self._optimizer = model, optimizer
        self._seen: dict[str, Allocations] = {}  # steps, and each other phase by its name
        self._steps: list[int] = []
        self._records = False  # whether torch keeps a history of a GPU's memory for a snapshot

    def start(self) -> None:
        """Begin to look at steps."""
        self._now = Allocations(self._model, self._optimizer).__enter__()
        self._records = self._now.device.type == "cuda"
        if self._records:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)

    def step(self, number: int) -> AbstractContextManager[None]:
        """Inside is step `number` of the run."""
        self._steps.append(number)
        return self._now.step(number)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Inside is something else, between two of the steps."""
        return self._now.phase(name)

    def aside(self, name: str) -> AbstractContextManager[None] | None:
        """Look at what happens inside, unless the like was seen before."""
        seen = any(phase.phase == name for it in self._seen.values() for phase in it.phases)
        return None if seen else self._look(name)

    @contextmanager
    def _look(self, name: str) -> Iterator[None]:
        with Allocations(self._model, self._optimizer) as seen, seen.phase(name):
            yield
        self._seen[name] = seen

    def stop(self) -> None:
        """Look no more at steps."""
        self._now.__exit__(None, None, None)
        names = {phase.phase for phase in self._now.phases}
        others = {name: seen for name, seen in self._seen.items() if name not in names}
        self._seen = {STEPS: self._now, **others}

    def write(self) -> list[str]:
        """Write what was seen until now, and say what took most in the steps."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._records:
            self._records = False
            try:
                # a pickle, which is torch's own format for pytorch.org/memory_viz: torch writes it, and nothing here reads it
                torch.cuda.memory._dump_snapshot(str(self._folder / "snapshot.pickle"))
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
        every = list(self._seen.values())
        write_phases(self._folder / "memory.csv", every)
        if self._config.picture:
            from trainkit.profile import picture  # matplotlib takes a second, which only those who draw should wait for

            picture.draw(self._folder / "memory.png", every)
        steps = self._seen.get(STEPS)
        if steps is None:
            return []
        write_spikes(self._folder / "spikes.csv", steps, self._config.spikes)
        largest = ", ".join(f"{what} {human_bytes(size)}" for what, size in consumers(steps)[:3])
        return [
            f"profile: memory of steps {self._steps[0]} to {self._steps[-1]} in {self._folder}: "
            f"peak {human_bytes(steps.peak)} in {steps.highest.phase}; largest: {largest}"
        ]


def write_phases(path: Path, seen: Sequence[Allocations]) -> None:
    """One row a phase of a step: the bytes of each category when most were allocated, and their sum."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "phase", *CATEGORIES, "peak"])
        for it in seen:
            for phase in (p for p in it.phases if p.phase != OUTSIDE):
                step = phase.step if phase.step >= 0 else ""
                table.writerow([step, phase.phase, *(phase.at_peak[c] for c in CATEGORIES), phase.peak])


def write_spikes(path: Path, seen: Allocations, share: float) -> None:
    """Allocations larger than `share` of the peak, the largest first; those of one maker and size in one row."""
    rows: dict[tuple[int, str, str, str], int] = {}
    for block in seen.blocks:
        if block.begin >= 0 and block.bytes > share * seen.peak:
            key = (block.bytes, block.phase, block.category, maker(block))
            rows[key] = rows.get(key, 0) + 1
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["bytes", "share_of_peak", "times", "phase", "category", "operator"])
        for (size, phase, category, operator), times in sorted(rows.items(), reverse=True):
            table.writerow([size, f"{size / seen.peak:.4f}", times, phase, category, operator])


def consumers(seen: Allocations) -> list[tuple[str, int]]:
    """What was alive at the peak, by category and maker, the largest first."""
    sizes: dict[str, int] = {}
    for block in alive(seen.blocks, seen.highest.at):
        operator = maker(block)
        what = f"{block.category} of {operator}" if operator else block.category
        sizes[what] = sizes.get(what, 0) + block.bytes
    return sorted(sizes.items(), key=lambda it: -it[1])


_PLUMBING = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "resize_", "to")}
_ENGINE = "autograd::engine::"


def maker(block: Block) -> str:
    """What made an allocation: the outermost and the innermost operator that a person would know."""
    names = [n for n in block.made_by if n not in _PLUMBING and not n.startswith(_ENGINE)] or list(block.made_by[-1:])
    return " > ".join(dict.fromkeys([*names[:1], *names[-1:]]))
