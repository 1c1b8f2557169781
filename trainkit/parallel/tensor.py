"""Tensor parallelism with sequence parallelism and a loss over parts of the vocabulary: ranks share every layer's matrices
(Shoeybi et al. 2019, arXiv:1909.08053), and outside them every rank has its part of the positions (Korthikanti et al. 2022,
arXiv:2205.05198).

Grade: reordered. A rank's block is a smaller plain one, with its own heads and its own part of the hidden width, so that
whatever works on plain tensors works here. B rows, T positions, D model width, V vocabulary, n ranks.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.parallel.collectives import Copy, Gather, Scatter, Sum, gathered, summed
from trainkit.slices import Cut


class Tensors:
    """The ranks that share each layer. Between layers a rank has T/n positions, or all of them where T does not divide, as
    in generation."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.sequence = True

    def whole(self, x: Tensor) -> Tensor:
        """(B, T/n, D) to (B, T, D), on which every rank does its part."""
        return Gather.apply(x, 1, self.group) if self.sequence else Copy.apply(x, self.group)

    def part(self, x: Tensor) -> Tensor:
        """(B, T, D), which are to be summed, to (B, T/n, D)."""
        return Scatter.apply(x, 1, self.group) if self.sequence else Sum.apply(x, self.group)

    def positions(self, x: Tensor) -> Tensor:
        """This rank's positions of something (..., T, D) that every rank has."""
        return x.chunk(self.size, -2)[self.rank] if self.sequence else x

    def see(self, tokens: Tensor, *, cached: bool) -> None:
        """Rows of tokens come."""
        self.sequence = not cached and tokens.shape[1] % self.size == 0


class Vocabulary:
    """A rank's part of the head: the ids from `begin` on."""

    def __init__(self, tensors: Tensors, begin: int) -> None:
        self._tensors, self.begin, self.size = tensors, begin, tensors.size

    def see(self, tokens: Tensor, *, cached: bool) -> None:
        """Rows of tokens come, to a stage that has no whole backbone."""
        self._tensors.see(tokens, cached=cached)

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden states of all positions, on which every rank does its part."""
        return self._tensors.whole(x)

    def logits(self, part: Tensor) -> Tensor:
        """The whole vocabulary's, from each rank's."""
        return gathered(part, part.ndim - 1, self._tensors.group)

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks."""
        return summed(x, self._tensors.group)

    def largest(self, x: Tensor) -> Tensor:
        """Over the ranks."""
        return summed(x, self._tensors.group, dist.ReduceOp.MAX)


def split(model: nn.Module, tensors: Tensors, cuts: dict[str, Cut]) -> None:
    """Make `model`'s parameters those of one rank, in place, as `cuts` (by parameter name) say. They get new memory where
    the model's is: on the meta device none."""
    for name, cut in cuts.items():
        module, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        before = getattr(module, own)
        here = nn.Parameter(torch.empty(cut.here, dtype=before.dtype, device=before.device), before.requires_grad)
        here.grad_dtype = before.grad_dtype
        setattr(module, own, here)
    backbone: Any = model.backbone
    backbone.register_forward_pre_hook(partial(_see, tensors), with_kwargs=True)
    begin = cuts["backbone.embed.weight"].runs[0][0]
    backbone.embed.forward = partial(_looked_up, backbone.embed, tensors, begin)
    if backbone.position is not None:
        backbone.position.register_forward_hook(lambda module, args, y: tensors.positions(y))
    for block in backbone.blocks:
        block.attention.heads //= tensors.size
        block.attention.groups //= tensors.size
        for norm in (block.attention_norm, block.mlp_norm):
            norm.register_forward_hook(lambda module, args, y: tensors.whole(y))
        for out in (block.attention.out, block.mlp.out):
            out.forward = partial(_added_up, out, tensors)
    model.vocabulary = Vocabulary(tensors, begin)  # type: ignore[assignment]  # not a module


def _see(tensors: Tensors, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors.see(args[0], cached=kwargs.get("caches") is not None)


def _looked_up(embed: nn.Embedding, tensors: Tensors, begin: int, tokens: Tensor) -> Tensor:
    """Each rank looks up its own ids, the others' are zero."""
    mine = (tokens >= begin) & (tokens < begin + embed.weight.shape[0])
    found: Tensor = type(embed).forward(embed, torch.where(mine, tokens - begin, 0))
    return tensors.part(found.masked_fill(~mine[..., None], 0))


def _added_up(out: Any, tensors: Tensors, x: Tensor) -> Tensor:
    """The last matrix of a layer, of which every rank has some columns. Its bias is added once."""
    y = tensors.part(F.linear(x, out.weight))
    return y if out.bias is None else y + out.bias.to(y.dtype)
