"""Where a tensor of our decoder comes from in a file of a family: the names, and what is done to what they hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LLAMA_ENDS = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LLAMA = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.into": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.out": ("mlp.down_proj",),
}
TOGETHER = [names for names in _LLAMA.values() if len(names) > 1]  # modules of theirs that are one of ours
_GPT2_ENDS = {"embed": "transformer.wte", "position": "transformer.wpe", "norm": "transformer.ln_f"}
_GPT2 = {
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.into": ("mlp.c_fc",),
    "mlp.out": ("mlp.c_proj",),
}


@dataclass(frozen=True)
class Place:
    """One of our tensors is `names`, one after the other along the first dimension, each turned over if `transposed`."""

    names: tuple[str, ...]
    transposed: bool = False

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of theirs."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T if self.transposed else whole

    def split(self, ours: Tensor, sizes: list[int]) -> dict[str, Tensor]:
        """Theirs of ours; `sizes` are their rows."""
        whole = ours.T if self.transposed else ours
        parts = [whole] if len(self.names) == 1 else list(whole.split(sizes))
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}


def place(ours: str, family: str) -> Place:
    """Where the tensor of that name of our backbone comes from.

    Raises:
        KeyError: the family has nothing of the kind.
    """
    gpt2 = family == "gpt2"
    inside, ends = (_GPT2, _GPT2_ENDS) if gpt2 else (_LLAMA, _LLAMA_ENDS)
    owner, _, kind = ours.rpartition(".")
    if not owner.startswith("blocks."):
        return Place((f"{ends[owner]}.{kind}",))
    _, number, part = owner.split(".", 2)
    layer = f"transformer.h.{number}" if gpt2 else f"model.layers.{number}"
    theirs = inside[part]
    if part == "mlp.into" and family == "arcee":
        theirs = ("mlp.up_proj",)
    turned = gpt2 and kind == "weight" and not part.endswith("norm")
    return Place(tuple(f"{layer}.{name}.{kind}" for name in theirs), turned)


def gathered(wanted: Iterator[str] | list[str], family: str, has: Callable[[str], bool]) -> dict[str, Place]:
    """The places of all `wanted` tensors of ours, under the names that a file `has`.

    Raises:
        KeyError: it lacks one, whose name is the error's.
    """
    found = {}
    for ours in wanted:
        there = place(ours, family)
        names = []
        for name in there.names:
            bare = name.partition(".")[2]
            spelled = next((n for n in (name, bare) if has(n)), None)
            if spelled is None:
                raise KeyError(name)
            names.append(spelled)
        found[ours] = Place(tuple(names), there.transposed)
    return found


def theirs(state: Mapping[str, Tensor], decoder: Any, family: str) -> dict[str, Tensor]:
    """Our backbone's tensors under a family's names, in its shapes."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        out |= place(name, family).split(tensor, rows(name, decoder))
    return out


def rows(name: str, decoder: Any) -> list[int]:
    """How many rows of our tensor of that name each of theirs is, where it is several."""
    heads, groups, k = decoder.attention.shape(decoder.width)
    hidden = decoder.mlp.width(decoder.width)
    return [heads * k, groups * k, groups * k] if ".attention.qkv" in name else [hidden, hidden]


def ours(state: Mapping[str, Tensor], wanted: list[str], family: str) -> dict[str, Tensor]:
    """Our backbone's tensors of a family's."""
    places = gathered(wanted, family, state.__contains__)
    return {name: there.join([state[n] for n in there.names]) for name, there in places.items()}
