"""The Llama path against transformers' LlamaForCausalLM with random weights."""

from functools import partial

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.test_models import model, tokens
from trainkit.models.attention import Attention


def test_llama_gives_the_logits_of_transformers() -> None:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            rms_norm_eps=1e-3,
            tie_word_embeddings=False,
        )
    ).double()
    ours = model(attention=Attention(heads=4, kv_heads=2), tied=False, norm_eps=1e-3)
    state = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    mine = dict(ours.backbone.named_parameters())
    with torch.no_grad():
        for name, other in state.items():
            theirs.get_parameter(other).copy_(mine[name])
        for i, layer in enumerate(theirs.model.layers):
            block = f"blocks.{i}."
            q, k, v = mine[f"{block}attention.qkv.weight"].split([16, 8, 8])
            gate, up = mine[f"{block}mlp.into.weight"].chunk(2)
            pairs = {
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": mine[f"{block}attention.out.weight"],
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": mine[f"{block}mlp.out.weight"],
                "input_layernorm": mine[f"{block}attention_norm.weight"],
                "post_attention_layernorm": mine[f"{block}mlp_norm.weight"],
            }
            for other, weight in pairs.items():
                layer.get_parameter(f"{other}.weight").copy_(weight)
    x = tokens(3, 32)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-5)  # in float64 but for norms and angles
    angles = torch.outer(torch.arange(32).double(), 10_000.0 ** -(torch.arange(0, 4, 2).double() / 4)).repeat(1, 2)[
        None
    ]
    theirs.model.rotary_emb.forward = lambda *_, **__: (angles.cos(), angles.sin())
    for norm in theirs.modules():
        if isinstance(norm, LlamaRMSNorm):
            norm.forward = partial(F.rms_norm, normalized_shape=(16,), weight=norm.weight, eps=1e-3)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-10)
