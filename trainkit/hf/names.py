"""Where a tensor of our decoder comes from in a file of a family: the names, and what is done to what they hold."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_LLAMA_ENDS = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LLAMA: dict[str, tuple[str, ...]] = {
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
_GPT2: dict[str, tuple[str, ...]] = {
    "attention_norm": ("ln_1",),
    "attention.qkv": ("attn.c_attn",),
    "attention.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.into": ("mlp.c_fc",),
    "mlp.out": ("mlp.c_proj",),
}


_BERT_ENDS = {
    "embed": "embeddings.word_embeddings",
    "position": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
_BERT: dict[str, tuple[str, ...]] = {
    "attention_norm": ("attention.output.LayerNorm",),
    "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.out": ("attention.output.dense",),
    "mlp_norm": ("output.LayerNorm",),
    "mlp.into": ("intermediate.dense",),
    "mlp.out": ("output.dense",),
}
_MODERN_ENDS = {"embed": "model.embeddings.tok_embeddings", "embed_norm": "model.embeddings.norm"}
_MODERN: dict[str, tuple[str, ...]] = {
    "attention_norm": ("attn_norm",),
    "attention.qkv": ("attn.Wqkv",),
    "attention.out": ("attn.Wo",),
    "mlp_norm": ("mlp_norm",),
    "mlp.into": ("mlp.Wi",),
    "mlp.out": ("mlp.Wo",),
}
_TYPES = "embeddings.token_type_embeddings.weight"  # of which texts have the first
_FAMILIES: dict[
    str, tuple[str, dict[str, tuple[str, ...]], dict[str, str]]
] = {  # where a layer is, what is in it, and what is around the layers
    "gpt2": ("transformer.h", _GPT2, _GPT2_ENDS),
    "bert": ("encoder.layer", _BERT, _BERT_ENDS),
    "modernbert": ("model.layers", _MODERN, {**_MODERN_ENDS, "norm": "model.final_norm"}),
    "arcee": ("model.layers", {**_LLAMA, "mlp.into": ("mlp.up_proj",)}, _LLAMA_ENDS),
}
# what encoders were pretrained with, for which a task here has its own or no need
HEADS = ("cls.", "pooler.", "bert.pooler.", "roberta.pooler.", "lm_head.", "head.", "decoder.", "classifier.")
_SAME = {"roberta": "bert", "xlm-roberta": "bert"}
_OLDER = {".weight": ".gamma", ".bias": ".beta"}  # what the first BERTs call a norm's


@dataclass(frozen=True)
class Place:
    """One of our tensors is `names`, one after the other along the first dimension, each turned over if `transposed`. With
    `skipped` rows it is the first of two from that row on, and the second's first row added to each."""

    names: tuple[str, ...]
    transposed: bool = False
    skipped: int | None = None

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor of theirs."""
        if self.skipped is not None:
            return parts[0][self.skipped :] + parts[1][0]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T if self.transposed else whole

    def split(self, ours: Tensor, sizes: list[int]) -> dict[str, Tensor]:
        """Theirs of ours; `sizes` are their rows."""
        if self.skipped is not None:
            return {self.names[0]: ours.contiguous(), self.names[1]: ours.new_zeros(2, ours.shape[1])}
        whole = ours.T if self.transposed else ours
        parts = [whole] if len(self.names) == 1 else list(whole.split(sizes))
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}


def place(ours: str, family: str, skipped: int = 0) -> Place:
    """Where the tensor of that name of our backbone comes from; of learned positions those behind `skipped` ones.

    Raises:
        KeyError: the family has nothing of the kind.
    """
    family = _SAME.get(family, family)
    layers, inside, ends = _FAMILIES.get(family, ("model.layers", _LLAMA, _LLAMA_ENDS))
    owner, _, kind = ours.rpartition(".")
    if not owner.startswith("blocks."):
        name = f"{ends[owner]}.{kind}"
        return Place((name, _TYPES), skipped=skipped) if (family, owner) == ("bert", "position") else Place((name,))
    _, number, part = owner.split(".", 2)
    turned = family == "gpt2" and kind == "weight" and not part.endswith("norm")
    return Place(tuple(f"{layers}.{number}.{name}.{kind}" for name in inside[part]), turned)


def gathered(
    wanted: Iterator[str] | list[str], family: str, has: Callable[[str], bool], skipped: int = 0
) -> dict[str, Place]:
    """The places of all `wanted` tensors of ours, under the names that a file `has`.

    Raises:
        KeyError: it lacks one, whose name is the error's.
    """
    found = {}
    for ours in wanted:
        there = place(ours, family, skipped)
        names = []
        for name in there.names:
            spelled = next((n for n in _spellings(name, family) if has(n)), None)
            if spelled is None:
                raise KeyError(name)
            names.append(spelled)
        found[ours] = replace(there, names=tuple(names))
    return found


def _spellings(name: str, family: str) -> Iterator[str]:
    """What a tensor is called in files of a model with a head and of one without."""
    alone = _SAME.get(family, family) == "bert"
    head = "roberta." if family in _SAME else "bert."
    for one in (name, head + name) if alone else (name, name.partition(".")[2]):
        yield one
        end = one[one.rindex(".") :]
        if alone and "LayerNorm" in one:
            yield one.removesuffix(end) + _OLDER[end]


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
