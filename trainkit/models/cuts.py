"""Which rows and columns of a decoder's matrices one of several tensor-parallel ranks holds (Shoeybi et al. 2019,
arXiv:1909.08053): whole heads, a part of the hidden width, a part of the vocabulary."""

from typing import Any

from trainkit.models.mlp import GATED
from trainkit.slices import Cut


def cuts(backbone: Any, rank: int, size: int) -> dict[str, Cut]:
    """By parameter name in a whole `backbone`. What is not named is whole on every rank."""
    cfg = backbone.cfg
    heads, groups, k = cfg.attention.shape(cfg.width)
    hidden = cfg.mlp.width(cfg.width)

    def part(begin: int, length: int) -> tuple[int, int]:
        """This rank's of `length` numbers that lie from `begin` on."""
        return begin + rank * (length // size), length // size

    qkv = (part(0, heads * k), part(heads * k, groups * k), part((heads + groups) * k, groups * k))
    into = (part(0, hidden), part(hidden, hidden))[: 2 if cfg.mlp.activation in GATED else 1]
    found = {
        "embed.weight": Cut((cfg.vocab, cfg.width), 0, (part(0, cfg.vocab),)),
        "head.weight": Cut((cfg.vocab, cfg.width), 0, (part(0, cfg.vocab),)),
    }
    for number in range(cfg.depth):
        block = f"blocks.{number}"
        for name, runs in ((f"{block}.attention.qkv", qkv), (f"{block}.mlp.into", into)):
            rows = (heads + 2 * groups) * k if runs is qkv else hidden * len(into)
            found |= {f"{name}.weight": Cut((rows, cfg.width), 0, runs), f"{name}.bias": Cut((rows,), 0, runs)}
        found[f"{block}.attention.out.weight"] = Cut((cfg.width, heads * k), 1, (part(0, heads * k),))
        found[f"{block}.mlp.out.weight"] = Cut((cfg.width, hidden), 1, (part(0, hidden),))
    names = dict(backbone.named_parameters())
    return {name: cut for name, cut in found.items() if name in names}
