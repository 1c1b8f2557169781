"""Bytes that tensors take, by torch's profiler."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that tensors made in `work` take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
