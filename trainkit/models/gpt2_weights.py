"""GPT-2's weights under our names (Radford et al. 2019; the names are those of transformers' GPT2LMHeadModel)."""

import re
from collections.abc import Mapping

from torch import Tensor

_PARTS = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.into",
    "mlp.c_proj": "mlp.out",
}
_ENDS = {"wte": "embed", "wpe": "position", "ln_f": "norm"}


def from_gpt2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A GPT-2 state dict as a backbone's. Its linear maps are stored input-first and come transposed.

    Raises:
        ValueError: a tensor that GPT-2 does not have.
    """
    ours = {}
    for name, tensor in state.items():
        bare = name.removeprefix("transformer.")
        if bare == "lm_head.weight" or re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", bare):
            continue  # the head is the embedding; old files carry the causal mask as a buffer
        block = re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", bare)
        end = re.fullmatch(r"(\w+)\.(weight|bias)", bare)
        if block and block[2] in _PARTS:
            transposed = block[3] == "weight" and not block[2].startswith("ln")
            ours[f"blocks.{block[1]}.{_PARTS[block[2]]}.{block[3]}"] = tensor.T if transposed else tensor
        elif end and end[1] in _ENDS:
            ours[f"{_ENDS[end[1]]}.{end[2]}"] = tensor
        else:
            raise ValueError(f"not a tensor of GPT-2: {name}")
    return ours
