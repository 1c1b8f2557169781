"""What a run takes at the least, by arithmetic alone: too little to plan by, enough to leave out what cannot fit and to try
first what is fast."""

from dataclasses import fields, replace
from functools import cache

import torch

from trainkit.memory import Memory
from trainkit.models import Decoder, Foreign
from trainkit.models.mlp import GATED
from trainkit.parallel import Sizes
from trainkit.plan.cards import HOST_MEMORY
from trainkit.plan.planned import Setting, bubble, mesh_of
from trainkit.plan.world import NODE, Line
from trainkit.run import Run

# what of `Memory` is counted here; of a run with anything else nothing is known
_KNOWN = {f.name for f in fields(Memory)} & {
    *("microbatch", "grad_dtype", "checkpoint", "offload_activations", "stream", "fused_loss", "states"),
    *("offload_optimizer", "step_in_backward"),
}
_STATE_BYTES = {None: 4.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}  # a moment's, a number
_BASE_BITS = {"int8": 8, "int4": 4, "nf4": 4}


def least_bytes(run: Run, setting: Setting) -> float:
    """What the allocator of one rank's device will at least have handed out at the end of a backward."""
    memory = run.memory
    if isinstance(run.model, Foreign) or any(
        getattr(memory, f.name) != f.default for f in fields(memory) if f.name not in _KNOWN
    ):
        return 0.0
    of_blocks, outside = _of_rank(run, setting)
    wide = getattr(torch, run.precision.params).itemsize
    if memory.stream:
        return outside * wide
    adapter = run.model.adapter
    if adapter is not None:
        return outside * wide + of_blocks * _BASE_BITS.get(adapter.quantize or "", 8 * wide) / 8
    of_gradient = getattr(torch, memory.grad_dtype).itemsize if memory.grad_dtype else wide
    each = wide + (0 if memory.step_in_backward else of_gradient)
    each += 0 if memory.offload_optimizer else _of_states(run)
    return (of_blocks + outside) * each


def most_rows(run: Run, setting: Setting) -> int:
    """The most rows at once, of all of a rank's or a power of two, with which the run may fit; 0 where not even one may."""
    sizes = mesh_of(run, setting)
    least, each, card = least_bytes(run, setting), row_bytes(run) / (sizes.tp * sizes.cp), setting.card
    rows = run.data.batch // sizes.data // sizes.pp
    tried = [rows] if run.memory.step_in_backward else sizes_of(rows)
    return max((n for n in tried if card.needed(int(least + n * each), setting.ranks) <= card.bytes), default=0)


def sizes_of(rows: int) -> list[int]:
    """Microbatches that are worth a try, the smallest first: powers of two, and all rows."""
    return sorted({rows, *(1 << i for i in range(rows.bit_length()) if 1 << i < rows)})


def least_seconds(run: Run, setting: Setting) -> float:
    """How long a step takes at the least: its matrix products, what goes to the host and back, and the host's update; and
    what ranks say to each other."""
    if isinstance(run.model, Foreign):
        return 0.0
    card, memory, sizes = setting.card, run.memory, mesh_of(run, setting)
    rows = run.data.batch / sizes.data
    again = _again(run)
    flops = run.model.flops_per_token(run.data.length) * rows * run.data.length / (sizes.tp * sizes.cp * sizes.pp)
    dtype = torch.float8_e4m3fn if run.precision.float8 else run.precision.matmul_dtype()
    compute = flops * (1 + again / 3) / (card.rate(dtype, run.precision.tf32) * setting.share)
    (of_blocks, outside), wide = _of_rank(run, setting), getattr(torch, run.precision.params).itemsize
    parts = -(-rows // max(1, most_rows(run, setting)))
    moved = 2.0 * (of_blocks + outside) * wide if memory.offload_optimizer else 0.0
    if memory.stream:  # blocks come twice, what is beside them once, and gradients leave, of every microbatch
        moved = parts * (3.0 * of_blocks + 2 * outside) * wide
    if memory.offload_activations:
        moved += 2 * rows * row_bytes(replace(run, memory=replace(memory, offload_activations=None)))
    away = (memory.stream or memory.offload_optimizer) and run.model.adapter is None
    updated = (of_blocks + outside) * (2 * wide + _of_states(run)) if away else 0.0
    waited, beside = _talked(run, setting, sizes, rows, parts)
    step = max(compute + waited, moved / (card.host * 1e9), beside) + updated / (HOST_MEMORY * 1e9)
    return step / (1 - bubble(run, sizes))


def _again(run: Run) -> float:
    """How much of its forward a step makes twice."""
    checkpoint = run.memory.checkpoint
    return 1 / checkpoint.every if checkpoint and not checkpoint.selective else 0.0


def _talked(run: Run, setting: Setting, sizes: Sizes, rows: float, parts: float) -> tuple[float, float]:
    """Seconds that a rank waits for others of its layers and positions, and those that it talks beside."""
    if setting.ranks == 1:
        return 0.0, 0.0
    assert isinstance(run.model, Decoder)
    card, model, wide = setting.card, run.model, getattr(torch, run.precision.params).itemsize
    of_blocks, outside = (n / (sizes.tp * sizes.pp) for n in _parameters(model))
    weights = (of_blocks + outside) * wide
    _, groups, k = model.attention.shape(model.width)
    narrow, layers = run.precision.matmul_dtype().itemsize, model.depth / sizes.pp
    positions = rows * run.data.length / sizes.cp

    def ring(axis_size: int, inside: int, whole: float, times: float) -> float:
        """`whole` bytes go round so often among ranks between which lie `inside` others."""
        if axis_size == 1:
            return 0.0
        line = Line("", axis_size, max(1, min(axis_size, NODE // inside)))
        return times * card.talked(line, whole * (axis_size - 1) / axis_size, axis_size - 1)

    again = _again(run)
    passes = max(parts, 1.0) * layers
    waited = ring(sizes.tp, 1, positions * model.width * narrow / max(parts, 1.0), (8 + 4 * again) * passes)
    keys = positions * sizes.cp * 2 * groups * k / sizes.tp * narrow / max(parts, 1.0)
    waited += ring(sizes.cp, sizes.tp, keys, (2 + again) * passes)
    shards, near = sizes.dp_shard * sizes.cp, sizes.tp
    if run.parallel.shards:
        gathers = 1.0 if sizes.pp > 1 else 2.0 * max(parts, 1.0)
        beside = ring(shards, near, weights / layers, (gathers + 1) * layers)
        beside += ring(sizes.dp_replicate, near * shards, weights / shards / layers, 2 * layers)
    else:
        beside = ring(sizes.dp_replicate * sizes.cp, near, weights, 2.0)
    return waited, beside


def row_bytes(run: Run) -> float:
    """What blocks keep of one row for their backward, at the least."""
    if run.memory.offload_activations or isinstance(run.model, Foreign):
        return 0.0
    model, checkpoint = run.model, run.memory.checkpoint
    wide, narrow = getattr(torch, run.precision.params).itemsize, run.precision.matmul_dtype().itemsize
    heads, groups, k = model.attention.shape(model.width)
    gated, hidden = model.mlp.activation in GATED, model.mlp.width(model.width)
    of_attention = 2 * model.width + (2 * heads + 2 * groups) * k  # and what goes into the MLP, or comes out of it
    whole = (of_attention + (4 if gated else 2) * hidden) * narrow + 2 * model.width * wide
    again = model.width * wide
    if checkpoint and checkpoint.selective:
        again += (of_attention + (2 if gated else 1) * hidden) * narrow
    if model.adapter is not None:
        whole = again = model.width * wide
    share = 1 / checkpoint.every if checkpoint else 0.0
    return run.data.length * model.depth * (share * again + (1 - share) * whole)


def _of_rank(run: Run, setting: Setting) -> tuple[float, float]:
    """How many parameters a rank holds of blocks, and how many beside them, at the least."""
    assert isinstance(run.model, Decoder)
    of_blocks, outside = _parameters(run.model)
    sizes = mesh_of(run, setting)
    sliced = sizes.tp * (sizes.dp_shard * sizes.cp if run.parallel.shards else 1)
    return of_blocks / sliced / sizes.pp, outside / sliced / (1 if sizes.pp == 1 else 2)


@cache
def _parameters(model: Decoder) -> tuple[int, int]:
    """How many there are in blocks, and how many beside them."""
    shallow, deeper = (replace(model, depth=depth, adapter=None).parameters() for depth in (1, 2))
    of_block = deeper - shallow
    return of_block * model.depth, shallow - of_block


def _of_states(run: Run) -> float:
    """Bytes of the optimizer's state a parameter."""
    moments = {"adamw": 2, "muon": 1}.get(run.optimizer.kind, int(bool(getattr(run.optimizer, "momentum", 0))))
    states = run.memory.states
    master = 4.0 if run.precision.rounding == "master" else 0.0
    return moments * _STATE_BYTES[states.format if states else None] + master
