"""How many ranks share what: the sizes of a mesh, by arithmetic, and what does not divide, before anything is built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainkit.errors import UserError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # the last one's ranks are neighbours: they talk most
OWN = {"ddp": "dp_replicate", "fsdp": "dp_shard", "hsdp": "dp_shard", "tp": "tp", "pp": "pp", "cp": "cp"}


@dataclass(frozen=True)
class Sizes:
    """Stages of a pipeline, replicas of the model, slices of it, parts of a row's positions, parts of a layer."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world(self) -> int:
        """All ranks."""
        return math.prod(self.by_axis().values())

    @property
    def data(self) -> int:
        """The ranks that read different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def mixed(self) -> bool:
        """Whether ranks share more than rows."""
        return self.world > self.data

    def by_axis(self) -> dict[str, int]:
        """Sizes in the order of the mesh."""
        return {axis: getattr(self, axis) for axis in AXES}

    def at(self, rank: int) -> dict[str, int]:
        """A rank's place along each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def __str__(self) -> str:
        return " × ".join(f"{axis} {n}" for axis, n in self.by_axis().items() if n > 1) or "one rank"


@dataclass(frozen=True)
class Shape:
    """What sizes have to divide: of the model its heads, hidden width, vocabulary and depth, of the data its length."""

    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    depth: int
    length: int


def sizes(kind: str, given: Mapping[str, int | None], world: int, machines: int = 1) -> Sizes:
    """The mesh of `world` ranks: what is `given`, and the rest (-1) where it is said to be, else along the axis of `kind`.

    Raises:
        UserError: they do not make up the world; with the sizes that would.
    """
    own = OWN.get(kind)
    asked = {axis: n for axis, n in given.items() if n is not None}
    if kind == "hsdp" and "dp_replicate" not in asked:
        asked["dp_replicate"] = max(2, machines)
    if own is not None and -1 not in asked.values():
        asked.setdefault(own, -1)
    fixed = math.prod(n for n in asked.values() if n != -1)
    rest = next((axis for axis, n in asked.items() if n == -1), None)
    if world % fixed or (rest is None and fixed != world):
        raise UserError(_does_not_make(kind, {a: n for a, n in asked.items() if n != -1}, rest, fixed, world))
    return Sizes(**{axis: world // fixed if n == -1 else n for axis, n in asked.items()})


def _does_not_make(kind: str, asked: dict[str, int], rest: str | None, fixed: int, world: int) -> str:
    if not asked:
        return (
            f"parallel={kind} trains in one process, but torchrun started {world}: "
            f"use parallel=ddp or parallel=fsdp, or one process"
        )
    said = " × ".join(f"parallel.{axis}={n}" for axis, n in asked.items())
    if rest is None:
        more = f"start {fixed} with torchrun" if world < fixed else f"use sizes whose product is {_near(fixed, world)}"
        todo = more if world % fixed else "add parallel.dp_shard=-1 for the rest"
        return f"{said} is {fixed} ranks, and there are {world}: {todo}"
    if len(asked) == 1:
        ((axis, n),) = asked.items()
        return f"{world} ranks do not divide by {said}: use parallel.{axis}={_near(n, world)}"
    return f"{world} ranks do not divide by {said}, which is {fixed}: use sizes whose product is {_near(fixed, world)}"


def refuse(it: Sizes, shape: Shape, stages: int = 1) -> None:
    """Raise UserError in one sentence where the model or the data do not divide, with the sizes that would. `stages` of the
    pipeline are on each rank."""
    parts = [
        ("tp", shape.heads, "model.attention.heads"),
        ("tp", shape.kv_heads, "model.attention.kv_heads"),
        ("tp", shape.hidden, "the width of model.mlp"),
        ("tp", shape.vocab, "model.vocab"),
        ("pp", shape.depth // math.gcd(shape.depth, stages), f"model.depth over {stages} stages a rank"),
        ("cp", shape.length, "data.length"),
    ]
    for axis, whole, name in parts:
        size = getattr(it, axis)
        if whole % size:
            value = shape.depth if axis == "pp" else whole
            name = "model.depth" if axis == "pp" and stages == 1 else name
            raise UserError(f"{name}={value} does not divide by parallel.{axis}={size}: use {_near(size, whole)}")
    if shape.length // it.cp % it.tp:
        raise UserError(
            f"data.length={shape.length} does not divide by parallel.cp × parallel.tp={it.cp * it.tp}: "
            f"use data.length={-(-shape.length // (it.cp * it.tp)) * it.cp * it.tp}"
        )


def _near(size: int, whole: int) -> str:
    """The divisors of `whole` beside `size`."""
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    below, above = [n for n in divisors if n < size][-2:], [n for n in divisors if n > size][:1]
    *most, last = map(str, below + above)
    return f"{', '.join(most)} or {last}" if most else last
