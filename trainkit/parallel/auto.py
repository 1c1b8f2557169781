"""parallel=auto: a mesh by arithmetic, from how many ranks there are, what the model is and what a rank's memory holds.

1. As many ranks as divide the batch read rows of their own: that costs the least to say to each other.
2. Of those left over, the ones of a machine share layers (tp) as far as heads, width, vocabulary and length divide; then ranks
   share positions (cp), then the depth (pp).
3. Where weights, gradients and two moments of a rank's part fit into half of its memory, ranks with other rows are replicas;
   else they have slices, among the ranks of one machine if those fit so, else among all.
"""

from collections.abc import Iterator

from trainkit.errors import UserError
from trainkit.parallel.sizes import Shape, Sizes, refuse

HALF = 0.5  # of a rank's memory; activations take the rest


def chosen(world: int, machine: int, shape: Shape, batch: int, state: int, memory: int) -> Sizes:
    """The mesh of `world` ranks, `machine` of them on each machine, for a model and its optimizer of `state` bytes, where a
    rank has `memory` bytes.

    Raises:
        UserError: no mesh divides both.
    """
    for sizes in _meshes(world, machine, batch):
        try:
            refuse(sizes, shape)
        except UserError:
            continue
        if batch // sizes.data % sizes.pp:
            continue
        return _sliced(sizes, machine, state / (sizes.tp * sizes.pp), HALF * memory)
    raise UserError(f"parallel=auto finds no mesh of {world} ranks for data.batch={batch}: use data.batch={world}")


def _meshes(world: int, machine: int, batch: int) -> Iterator[Sizes]:
    for data in [n for n in range(world, 0, -1) if world % n == batch % n == 0]:
        left = world // data
        for tp in [n for n in range(min(left, machine), 0, -1) if left % n == machine % n == 0]:
            for cp in [n for n in range(left // tp, 0, -1) if left // tp % n == 0]:
                yield Sizes(dp_replicate=data, tp=tp, cp=cp, pp=left // tp // cp)


def _sliced(it: Sizes, machine: int, state: float, room: float) -> Sizes:
    if state <= room or it.data == 1:
        return it
    near = it.data // max(1, it.world // machine)  # ranks with other rows on one machine
    slices = near if near > 1 and it.data % near == 0 and state / near <= room else it.data
    return Sizes(pp=it.pp, dp_replicate=it.data // slices, dp_shard=slices, cp=it.cp, tp=it.tp)
