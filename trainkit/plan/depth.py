"""From shallow models to deep ones. Blocks are equal, so what a step takes at the first block, an inner one, the last, and
before and after them is linear in the number of blocks: two depths say it, and a third one has to agree."""

from collections.abc import Callable

from trainkit.plan.trace import Numbers

SHALLOWEST = 3  # a first block, an inner one, a last one
PERIODS = (1, 2, 3, 4)  # a strategy may treat every second block, or every third, in its own way
AGREES = 1e-3


def of_depth(depth: int, trace: Callable[[int], Numbers]) -> tuple[Numbers, list[int]]:
    """What a model of `depth` blocks takes, and the depths that were traced to know it."""
    known: dict[int, Numbers] = {}

    def at(d: int) -> Numbers:
        if d not in known:
            known[d] = trace(d)
        return known[d]

    for period in PERIODS:
        low = SHALLOWEST + (depth - SHALLOWEST) % period
        depths = [low + i * period for i in range(3)]
        if depth <= depths[-1] or sum({*depths} - known.keys()) > depth:
            break
        one, two, three = (at(d) for d in depths)
        if _agree(three, _line(one, two, 2.0)):
            return _line(one, two, (depth - low) / period), sorted(known)
    return at(depth), [depth]


def _line(one: Numbers, two: Numbers, times: float) -> Numbers:
    return {name: one.get(name, 0) + times * (two.get(name, 0) - one.get(name, 0)) for name in one.keys() | two.keys()}


def _agree(found: Numbers, said: Numbers) -> bool:
    """Whether two are the same but for a thousandth of the largest of their kind."""
    largest: dict[str, float] = {}
    for name, value in found.items():
        largest[name[0]] = max(largest.get(name[0], 0), abs(value))
    return all(
        abs(found.get(name, 0) - said.get(name, 0)) <= AGREES * largest.get(name[0], 0)
        for name in found.keys() | said.keys()
    )
