"""`profile=time`: a trace of some steps that a browser shows, and a table of the operators that take longest."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainkit.config import Count, Natural, config
from trainkit.profile import stream

STEP = "training step"  # in the trace; a step's own time is what no operator takes


@config
class TimeProfile:
    """Let `after` steps of a process pass, warm up in one more, then look at `steps`. `top` operators are shown."""

    after: Natural = 6
    steps: Count = 3
    top: Count = 12

    @property
    def first(self) -> int:
        """The step to warm up in, from 1."""
        return self.after + 1

    @property
    def last(self) -> int:
        """The last step that is looked at."""
        return self.after + 1 + self.steps

    def build(self, folder: Path, device: torch.device) -> "TimeWatch":
        """A watch that writes into `folder`."""
        return TimeWatch(self, folder, device)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What an operator took a step: seconds of its own (of the device, where it is a GPU), their share of all, and how many
    floating-point operations a second those were, where torch can count them (else 0)."""

    name: str
    self_s: float
    share: float
    calls: float
    flops_per_s: float


class TimeWatch:
    """Writes `trace.json.gz` and `operators.csv`."""

    def __init__(self, config_: TimeProfile, folder: Path, device: torch.device) -> None:
        self.first, self.last = config_.first, config_.last
        self._config, self._folder, self._device = config_, folder, device
        self._steps: list[int] = []

    def start(self) -> None:
        """Begin with the warm-up."""
        stream.hush()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        # without shapes no floating-point operations are counted
        self._profile = profile(activities=activities, record_shapes=True, with_flops=True)
        self._profile.prepare_trace()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Inside is step `number` of the run. The first one is the warm-up."""
        if len(self._steps) == 1:
            self._profile.start_trace()
        with record_function(STEP):
            yield
        self._steps.append(number)

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """Inside is something else, between two of the steps: it is in the trace and not in the table."""
        return record_function(name)

    def aside(self, name: str) -> None:
        """Time is looked at in steps only."""

    def stop(self) -> None:
        """Look no more."""
        if len(self._steps) < 2:
            self._profile.start_trace()  # a profiler that is prepared has to start before it can stop
        self._profile.stop_trace()

    def write(self) -> list[str]:
        """Write what was seen, and tell the longest operators."""
        steps = self._steps[1:]
        if not steps:
            return ["profile: the run ended before a step could be timed"]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._folder / "trace.json.gz"))
        found = operators(self._profile.events(), self._device)
        write_operators(self._folder / "operators.csv", found)
        top = [o for o in found if o.share > 0][: self._config.top]
        largest = ", ".join(f"{o.name} {o.share:.0%}" for o in top[:3])
        return [
            f"profile: time of steps {steps[0]} to {steps[-1]} in {self._folder} (trace.json.gz, operators.csv); "
            f"largest: {largest}",
            *as_table(top),
        ]


def operators(events: Sequence[Any], device: torch.device) -> list[Operator]:
    """What each operator took a step, the longest first, from the profiler's events: of those in steps."""
    steps = [e.time_range for e in events if e.name == STEP]
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    sums: dict[str, list[float]] = {}
    for event in events:
        # a kernel's time counts for the operator that started it
        inside = any(s.start <= event.time_range.start <= s.end for s in steps)
        if inside and event.device_type == torch.autograd.DeviceType.CPU:
            known = sums.setdefault("outside operators" if event.name == STEP else event.name, [0.0, 0.0, 0.0])
            for i, more in enumerate((getattr(event, own) / 1e6, 1, event.flops or 0)):
                known[i] += more
    whole = max(sum(seconds for seconds, _, _ in sums.values()), 1e-12)
    found = [
        Operator(
            name=name,
            self_s=seconds / len(steps),
            share=seconds / whole,
            calls=calls / len(steps),
            flops_per_s=flops / seconds if seconds else 0.0,
        )
        for name, (seconds, calls, flops) in sums.items()
    ]
    return sorted(found, key=lambda o: -o.self_s)


def write_operators(path: Path, found: Sequence[Operator]) -> None:
    """One row an operator, per step."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["operator", "self_ms_per_step", "share", "calls_per_step", "gflop_per_s"])
        for o in found:
            rate = f"{o.flops_per_s / 1e9:.2f}" if o.flops_per_s else ""
            table.writerow([o.name, f"{o.self_s * 1e3:.4f}", f"{o.share:.4f}", f"{o.calls:g}", rate])


def as_table(found: Sequence[Operator]) -> list[str]:
    """Lines for a person."""
    width = max([len("operator"), *(min(len(o.name), 48) for o in found)])
    lines = [f"{'operator':{width}}  {'ms a step':>9}  share  {'calls':>6}  GFLOP/s"]
    for o in found:
        rate = f"{o.flops_per_s / 1e9:7.1f}" if o.flops_per_s >= 5e7 else ""
        lines.append(f"{o.name[:48]:{width}}  {o.self_s * 1e3:9.2f}  {o.share:5.1%}  {o.calls:6g}  {rate}".rstrip())
    return lines
