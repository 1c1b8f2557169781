"""From shallow models to deep ones. Blocks are equal, so what a step takes at the first block, an inner one, the last, and
before and after them is linear in the number of blocks: two depths say it, and a third one has to agree."""

from collections.abc import Callable

from trainkit.plan.trace import Numbers

SHALLOWEST = 3  # a first block, an inner one, a last one
PERIODS = (1, 2, 3, 4)  # a strategy may treat every second block, or every third, in its own way
AGREES = 1e-3


def of_depth(
    depth: int, trace: Callable[[int], Numbers], *, sure: bool = True, known: dict[int, Numbers] | None = None
) -> tuple[Numbers, list[int]]:
    """What a model of `depth` blocks takes, and the depths that were traced to know it.

    Args:
        sure: whether a third depth is asked. Without it two are believed.
        known: what was traced before, by depth; what is traced now is put there.
    """
    known = {} if known is None else known

    def at(d: int) -> Numbers:
        if d not in known:
            known[d] = trace(d)
        return known[d]

    for period in PERIODS:
        low = SHALLOWEST + (depth - SHALLOWEST) % period
        depths = [low + i * period for i in range(3)]
        if depth <= depths[-1] or sum({*depths} - known.keys()) > depth:
            break
        line = _line(at(depths[0]), at(depths[1]), (depth - low) / period)
        if not sure:
            return line, depths[:2]
        if _agree(at(depths[2]), _line(at(depths[0]), at(depths[1]), 2.0)):
            return line, sorted(known)
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
