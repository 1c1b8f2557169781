"""What ranks that share more than rows cannot do with the rest of a run, each refused by its name.

`REFUSED` is what docs/parallel.md tabulates. `fsdp`: ranks with different rows have slices of a model; `tp`, `cp`, `pp`: what
else ranks share.
"""

from collections.abc import Callable
from typing import Any

Wrong = Callable[[Any], bool]
MIXED = ("tp", "cp", "pp")

# of which axes, the words that a person gave, whether a run has them, why not, and what to do
REFUSED: list[tuple[tuple[str, ...], str, Wrong, str]] = [
    (
        ("fsdp",),
        "deterministic=elastic",
        lambda run: run["deterministic"] == "elastic",
        "sums whole gradients itself: use parallel=ddp or parallel=single",
    ),
    (
        MIXED,
        "deterministic=elastic",
        lambda run: run["deterministic"] == "elastic",
        "sums whole gradients row by row: use parallel=ddp or deterministic=layout",
    ),
    (
        ("tp", "pp"),
        "memory=step_in_backward",
        lambda run: run["memory"].step_in_backward is not None,
        "steps before gradients that these ranks share are summed: use parallel=fsdp",
    ),
    (
        MIXED,
        "task=mlm",
        lambda run: run["task"].kind == "mlm",
        "hides tokens that all of these ranks would have to know: use parallel=fsdp or parallel=ddp",
    ),
    (
        MIXED,
        "task=embedding",
        lambda run: run["task"].kind == "embedding",
        "takes hidden states of all layers and positions: use parallel=fsdp or parallel=ddp",
    ),
    (
        ("tp", "pp"),
        "model.post_norm",
        lambda run: getattr(run["model"], "post_norm", False),
        "normalises what these ranks have parts of: use parallel=fsdp or parallel=ddp",
    ),
    (
        ("tp", "pp"),
        "model.embed_norm",
        lambda run: getattr(run["model"], "embed_norm", False),
        "normalises what these ranks have parts of: use parallel=fsdp or parallel=ddp",
    ),
    (
        ("tp", "pp"),
        "model.adapter",
        lambda run: run["model"].adapter is not None,
        "learns beside whole matrices of all layers: use parallel=fsdp or parallel=ddp",
    ),
    (
        MIXED,
        "precision=fp16",
        lambda run: run["precision"].compute == "float16",
        "has a scaler on every rank, which must not differ: use precision=bf16",
    ),
    (
        ("tp",),
        "precision.float8",
        lambda run: run["precision"].float8 is not None,
        "scales whole matrices: use parallel=fsdp or precision=bf16",
    ),
    (
        ("tp",),
        "optimizer=muon",
        lambda run: run["optimizer"].kind == "muon",
        "turns whole matrices: use parallel=fsdp or optimizer=adamw",
    ),
    (
        ("tp",),
        "precision.rounding=stochastic",
        lambda run: run["precision"].rounding == "stochastic",
        "draws by the place in a whole matrix: use parallel=fsdp or precision.rounding=master",
    ),
    (
        ("tp",),
        "memory.fused_loss=off",
        lambda run: run["memory"].fused_loss == "off",
        "wants logits of the whole vocabulary on a rank: use memory.fused_loss=auto",
    ),
    (
        ("pp",),
        "memory=stream",
        lambda run: run["memory"].stream is not None,
        "brings blocks in one after the other, and microbatches cross in a pipeline: use memory=offload_optimizer",
    ),
    (
        ("pp",),
        "memory.microbatch=auto",
        lambda run: run["memory"].microbatch == "auto",
        "is found by a trial of two microbatches, and a pipeline needs more: give a number",
    ),
    (
        MIXED,
        "compile=full",
        lambda run: run["compile"] == "full",
        "makes one graph of what ranks say to each other: use compile=blocks",
    ),
]


def refuse(axes: set[str], **run: Any) -> None:
    """Raise ValueError in one sentence where ranks along `axes` cannot do what the `run` asks for."""
    for of, words, wrong, why in REFUSED:
        if (found := [axis for axis in of if axis in axes]) and wrong(run):
            raise ValueError(
                f"{words} {why}" if found == ["fsdp"] else f"{words} cannot go with parallel.{found[0]}: it {why}"
            )
