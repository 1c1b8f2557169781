"""Meshes that a search may try: all that divide ranks, model and data, each with the words that say it."""

from collections.abc import Iterator
from dataclasses import replace

from trainkit import spread
from trainkit.errors import UserError
from trainkit.parallel import Parallel, Sizes
from trainkit.parallel.sizes import OWN
from trainkit.plan.world import NODE, started
from trainkit.run import Run


def meshes(run: Run, ranks: int) -> Iterator[tuple[list[str], Run]]:
    """`run` on every mesh of so many ranks that training would not refuse. Layers are shared within a machine only."""
    with started(ranks):
        for sizes in _divided(run, ranks):
            try:
                made = replace(run, parallel=_parallel(run.parallel, sizes))
                spread.check(made)
            except (ValueError, UserError):
                continue
            yield words(sizes), made


def words(sizes: Sizes) -> list[str]:
    """What to type for it: a preset, whose axis has the rest of the ranks, and the sizes of the other axes."""
    kind = _kind(sizes)
    given = [f"parallel.{axis}={n}" for axis, n in sizes.by_axis().items() if n > 1 and axis != OWN[kind]]
    return [f"parallel={kind}", *given]


def _kind(sizes: Sizes) -> str:
    return (
        "fsdp"
        if sizes.dp_shard > 1
        else "ddp"
        if sizes.dp_replicate > 1
        else next(axis for axis in ("tp", "cp", "pp") if getattr(sizes, axis) > 1)
    )


def _parallel(before: Parallel, sizes: Sizes) -> Parallel:
    kind = _kind(sizes)
    given = {axis: n if n > 1 and axis != OWN[kind] else None for axis, n in sizes.by_axis().items()}
    return replace(before, kind=kind, **given)  # type: ignore[arg-type]  # one of its kinds


def _divided(run: Run, ranks: int) -> Iterator[Sizes]:
    """Sizes whose product is the ranks, and that divide what is quick to ask."""
    shape = spread.shape(run)
    for tp in _divisors(ranks, min(NODE, shape.kv_heads)):
        for pp in _divisors(ranks // tp, shape.depth):
            for cp in _divisors(ranks // tp // pp, shape.length):
                data = ranks // tp // pp // cp
                if run.data.batch % data or shape.depth % pp or shape.length % cp:
                    continue
                for slices in _divisors(data, data):
                    yield Sizes(pp=pp, dp_replicate=data // slices, dp_shard=slices, cp=cp, tp=tp)


def _divisors(whole: int, most: int) -> list[int]:
    return [n for n in range(1, min(whole, most) + 1) if whole % n == 0]
