"""A run's model on its ranks: what does not divide is refused before anything is built, and each builds its own part.

A model that is larger than a rank begins without memory. It is divided, gets memory for what is this rank's, and then its
weights, drawn tensor by tensor as on one process: every rank draws all of them and keeps its own, so that the largest tensor
is the most that is there beside them, and the weights are the same to the bit on any ranks.
"""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from trainkit import hardware, randomness
from trainkit.data.loader import refuse_rows
from trainkit.errors import UserError
from trainkit.models import Decoder
from trainkit.models.cuts import cuts
from trainkit.optimizers.formats import BLOCK
from trainkit.parallel import Ranks, Shape
from trainkit.run import Run
from trainkit.slices import Part, fill

BACKBONE = "backbone."


def settled(run: Run, memory: int | None = None) -> Run:
    """`run` with the mesh that parallel=auto means on these ranks, each with so many bytes of `memory` (None: as there are).

    Raises:
        UserError: there is none, or something else in the run cannot be done on it.
    """
    if run.parallel.kind != "auto":
        return run
    device = hardware.choose(run.parallel.device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1  # ranks share the host's memory
    width = getattr(torch, run.precision.params).itemsize
    mesh = run.parallel.settled(
        shape(run),
        batch=run.data.batch,
        state=4 * width * run.model.parameters(),  # weights, gradients, two moments
        memory=hardware.memory(device) // here if memory is None else memory,
    )
    try:
        return replace(run, parallel=mesh)
    except ValueError as error:
        raise UserError(f"parallel=auto chose {mesh.sizes()}, and {error}") from error


def check(run: Run) -> None:
    """Raise UserError where the ranks that torchrun started cannot share the run."""
    run.parallel.check(shape(run))
    sizes = run.parallel.sizes()
    if isinstance(run.model, Decoder):
        _refuse_cut_blocks(run, run.model, sizes.tp)
    elif sizes.tp * sizes.pp * sizes.cp > 1:
        raise UserError(
            "model=hf trains this model by its own code, which parallel.tp, pp and cp do not divide: use parallel=fsdp or ddp"
        )
    if run.data.gives == "text":  # pairs are checked where they are put together
        refuse_rows(run.data.batch, sizes.data)
    if (rows := run.data.batch // sizes.data) % sizes.pp:
        raise UserError(
            f"data.batch={run.data.batch} gives each replica {rows} rows, which do not make microbatches for parallel.pp="
            f"{sizes.pp}: use data.batch={-(-rows // sizes.pp) * sizes.pp * sizes.data}"
        )


def _refuse_cut_blocks(run: Run, model: Decoder, ranks: int) -> None:
    heads, _, k = model.attention.shape(model.width)
    for what, columns in (
        ("heads × head width", heads * k),
        ("width of model.mlp", model.mlp.width(model.width)),
    ):
        if run.memory.states and ranks > 1 and columns // ranks % BLOCK:
            raise UserError(
                f"memory.states keeps {BLOCK} numbers of a row together, and parallel.tp={ranks} cuts rows of {columns} "
                f"({what}): use sizes of which each rank has a multiple of {BLOCK}, or states of float32"
            )


def shape(run: Run) -> Shape:
    """What the sizes of a mesh have to divide."""
    heads, kv_heads, _ = run.model.attention.shape(run.model.width)
    hidden = run.model.mlp.width(run.model.width) if isinstance(run.model, Decoder) else run.model.width
    return Shape(
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        vocab=run.model.vocab,
        depth=run.model.depth,
        length=run.data.length,
    )


def model(run: Run, ranks: Ranks) -> nn.Module:
    """The task's model with fresh weights, as memory strategies and ranks want it."""
    randomness.seed_all(run.seed)
    empty = run.model if ranks.slices and _begins_empty(run) and isinstance(run.model, Decoder) else None
    backbone = empty.frame() if empty else run.model.build()
    made = run.task.build(backbone)
    made = run.precision.apply(made, ranks.device)
    made = run.speed.apply(made if empty else made.to(ranks.home))  # in its own format it takes less room there
    made = run.memory.apply(made, compiled=run.compile != "off")  # over whole blocks, before anything else wraps them
    ranks.divide(made, partial(_cuts, backbone))
    for stage in ranks.stages:
        run.precision.cast(stage, ranks.device)
    if empty:
        _materialise(made, ranks)
        _fill(made, empty)
    if run.deterministic != "elastic":  # which sums gradients itself
        ranks.replicate(made)
    return made


def _begins_empty(run: Run) -> bool:
    """Whether all that is drawn is the backbone's. An adapter looks at the weights beside which it is made, and a task may
    draw some of its own."""
    return run.model.adapter is None and run.task.head


def _cuts(backbone: nn.Module, rank: int, size: int) -> dict[str, Any]:
    return {BACKBONE + name: cut for name, cut in cuts(backbone, rank, size).items()}


def _materialise(model: nn.Module, ranks: Ranks) -> None:
    formats = {name: p.grad_dtype for name, p in model.named_parameters()}
    model.to_empty(device=ranks.home)
    for name, p in model.named_parameters():
        if p.grad_dtype != formats[name]:
            p.grad_dtype = formats[name]


def _fill(model: nn.Module, cfg: Decoder) -> None:
    places: dict[str, Any] = {name: tensor.detach() for name, tensor in model.named_parameters()}
    layout = getattr(model, "layout", None)
    for name, whole in cfg.fresh():
        full = BACKBONE + name
        if full in places:  # else it is another stage's
            cut = layout.cuts.get(full) if layout else None
            fill(places[full] if cut is None else Part(places[full], cut), whole)
