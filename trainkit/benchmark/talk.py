"""What ranks say to each other in a step: how much, how long it takes, and how much of that goes on beside the computation.

Bytes are counted op by op, as those that a rank sends in a ring; times are the profiler's. On a GPU, communication and
computation are kernels; on a CPU gloo's own threads and the thread that trains.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from trainkit.learner import Learner
from trainkit.parallel import Sizes
from trainkit.plan.kernels import COLLECTIVE, collective
from trainkit.plan.world import group_of, of_ranks
from trainkit.profile import stream

Span = tuple[float, float]


class Sent(TorchDispatchMode):
    """Counts `bytes` by axes and collective."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented  # it is made of plain tensors, whose ops come here in turn
        out = func(*args, **(kwargs or {}))
        if func.name().startswith(COLLECTIVE) and (group := group_of(args)) is not None:
            line = of_ranks(torch.distributed.get_process_group_ranks(group), self._sizes)
            given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in (args, out))
            if (cost := collective(func, line, given, made)) is not None:
                self.bytes[line.axes, cost.collective] += cost.sent
        return out


def measured(it: Learner) -> dict[str, Any]:
    """Of one step: `sent`, bytes of this rank by axes and collective; `seconds` of the step, in which ranks talked for
    `talked_s`, of which `exposed_s` went on beside nothing else."""
    assert it.ranks.sizes is not None
    stream.hush()
    with profile() as seen, Sent(it.ranks.sizes) as sent:
        it.train_step()
        if it.ranks.device.type == "cuda":
            torch.cuda.synchronize(it.ranks.device)
    talked, computed = spans(seen.events() or [])
    whole = union([*talked, *computed])
    return {
        "sent": [{"axes": axes, "collective": name, "bytes": n} for (axes, name), n in sorted(sent.bytes.items()) if n],
        "seconds": (whole[-1][1] - whole[0][0]) / 1e6 if whole else 0.0,
        "talked_s": length(union(talked)) / 1e6,
        "exposed_s": min(exposed(talked, computed), length(union(talked))) / 1e6,
    }


def spans(events: Iterable[Any]) -> tuple[list[Span], list[Span]]:
    """When ranks talked, and when this one computed, in microseconds."""
    known = list(events)
    on_gpu = [e for e in known if e.device_type == DeviceType.CUDA]
    if on_gpu:
        talk = [e for e in on_gpu if e.name.startswith("ncclDevKernel") or "nccl" in e.name.lower()]
        rest = [e for e in on_gpu if e not in talk]
    else:
        talk = [e for e in known if e.name.startswith("gloo:")]
        others = {e.thread for e in talk}  # gloo's threads, in which it copies
        rest = [e for e in known if e.thread not in others and e.name.startswith("aten::")]
    return [_span(e) for e in talk], [_span(e) for e in rest]


def _span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def union(some: Iterable[Span]) -> list[Span]:
    """The same time, in spans that do not touch."""
    found: list[Span] = []
    for begin, end in sorted(some):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def length(some: Iterable[Span]) -> float:
    """Of spans that do not touch."""
    return sum(end - begin for begin, end in some)


def exposed(talked: Iterable[Span], computed: Iterable[Span]) -> float:
    """How long ranks talked while this one did not compute."""
    beside = union(computed)
    return max(0.0, length(union([*talked, *beside])) - length(beside))
