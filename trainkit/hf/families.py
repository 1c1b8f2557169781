"""A config.json as the fields of our decoder, for the families that it can be, and back. Those that look both ways are in
`encoders`.

LLaMA (Touvron et al. 2023, arXiv:2302.13971), Mistral (Jiang et al. 2023, arXiv:2310.06825), Qwen2 (Yang et al. 2024,
arXiv:2407.10671), Qwen3 (Yang et al. 2025, arXiv:2505.09388), Arcee (LLaMA's with ReLU² in place of SwiGLU) and GPT-2
(Radford et al. 2019). SmolLM is LLaMA's.
"""

from collections.abc import Mapping
from typing import Any

from trainkit.hf import encoders
from trainkit.hf.encoders import Unlike

Json = Mapping[str, Any]
ROPE = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
DEFAULTS: dict[str, dict[str, Any]] = {  # what a config.json of the family leaves out
    "llama": {**ROPE, "max_position_embeddings": 2048},
    "arcee": {**ROPE, "max_position_embeddings": 4096, "hidden_act": "relu2", "rms_norm_eps": 1e-5},
    "mistral": {
        **ROPE,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "qwen2": {**ROPE, **WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {**ROPE, **WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "n_positions": 1024,
        "initializer_range": 0.02,
    },
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}


def fields(given: Json) -> dict[str, Any]:
    """The decoder's fields of a config.json, as YAML would hold them.

    Raises:
        Unlike: it is another architecture than our decoder can be, and why.
    """
    family = given.get("model_type")
    if family not in (every := {**DEFAULTS, **encoders.DEFAULTS}):
        raise Unlike(f"{family} is none of {', '.join(every)}")
    known = {**every[family], **given}
    try:
        if family in encoders.DEFAULTS:
            return encoders.fields(known)
        return _gpt2(known) if family == "gpt2" else _llama(known, family)
    except KeyError as error:
        raise Unlike(f"its config.json lacks {error}") from error


def config(decoder: Any) -> dict[str, Any]:
    """The config.json of a decoder, without its dtype and special tokens.

    Raises:
        Unlike: no architecture of transformers is it, and why.
    """
    it, heads = decoder, decoder.attention
    if it.depth == 0:
        raise Unlike("it has no blocks")
    if not heads.causal:
        return encoders.config(it)
    if it.post_norm or it.embed_norm or it.window_theta is not None:
        raise Unlike("none that looks back only has model.post_norm, model.embed_norm or model.window_theta")
    _, groups, k = heads.shape(it.width)
    qkv_bias = it.bias if heads.qkv_bias is None else heads.qkv_bias
    if (it.norm, it.position, it.bias) == ("layernorm", "learned", True):
        plain = it.mlp.activation in ("gelu", "gelu_tanh") and groups == heads.heads and k * heads.heads == it.width
        if not plain or heads.window or heads.qk_norm or not qkv_bias or not it.tied:
            raise Unlike("GPT-2 has GELU, one key head for each query head, no window and a tied head")
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": it.vocab,
            "n_embd": it.width,
            "n_layer": it.depth,
            "n_head": heads.heads,
            "n_inner": it.mlp.width(it.width),
            "n_positions": it.context,
            "activation_function": "gelu_new" if it.mlp.activation == "gelu_tanh" else "gelu",
            "layer_norm_epsilon": it.norm_eps,
            "initializer_range": it.init_std,
            **{f"{part}_pdrop": it.dropout for part in ("resid", "embd", "attn")},
            "tie_word_embeddings": True,
        }
    if (it.norm, it.position, it.bias) != ("rmsnorm", "rope", False):
        raise Unlike(f"none has model.norm={it.norm}, model.position={it.position} and model.bias={it.bias} together")
    family = "llama"
    if it.mlp.activation == "relu2":
        family = "arcee"
    elif it.mlp.activation != "swiglu":
        raise Unlike(f"none has RMSNorm, RoPE and model.mlp.activation={it.mlp.activation} together")
    elif heads.qk_norm:
        family = "qwen3"
    elif qkv_bias:
        family = "qwen2"
    elif heads.window:
        family = "mistral"
    if (family == "arcee" and (heads.window or heads.qk_norm or qkv_bias)) or (heads.qk_norm and qkv_bias):
        raise Unlike(f"{family} has no window, and no normalised queries and keys beside a bias of theirs")
    made = {
        "architectures": [f"{family.title()}ForCausalLM"],
        "model_type": family,
        "vocab_size": it.vocab,
        "hidden_size": it.width,
        "intermediate_size": it.mlp.width(it.width),
        "num_hidden_layers": it.depth,
        "num_attention_heads": heads.heads,
        "num_key_value_heads": groups,
        "head_dim": k,
        "hidden_act": "relu2" if family == "arcee" else "silu",
        "max_position_embeddings": it.context,
        "initializer_range": it.init_std,
        "rms_norm_eps": it.norm_eps,
        "tie_word_embeddings": it.tied,
        "attention_dropout": it.dropout,
        "rope_theta": it.rope_theta,
        **_scaled(it.rope_scaling, it.rope_theta),
    }
    if family == "mistral" and heads.full_layers:
        family = "qwen2"
        raise Unlike("mistral's window is the same in every layer: model.attention.full_layers has to be empty")
    if family == "mistral":
        made["sliding_window"] = heads.window
    elif heads.window:
        kinds = ["sliding_attention" if heads.window_of(i) else "full_attention" for i in range(it.depth)]
        made |= {
            "use_sliding_window": True,
            "sliding_window": heads.window,
            "layer_types": kinds,
            "max_window_layers": 0,
        }
    elif family in ("qwen2", "qwen3"):
        made |= {"use_sliding_window": False, "sliding_window": None}
    return made


def _llama(known: Json, family: str) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        if known.get(key):
            raise Unlike(f"its {key} is true")
    gated = family != "arcee"
    if known["hidden_act"] not in (("silu", "swish") if gated else ("relu2",)):
        raise Unlike(f"its hidden_act is {known['hidden_act']}")
    heads, depth = known["num_attention_heads"], known["num_hidden_layers"]
    rope = known.get("rope_parameters") or {}
    scaling = rope or known.get("rope_scaling") or {}
    attention: dict[str, Any] = {"heads": heads, "kv_heads": known.get("num_key_value_heads") or heads}
    if (width := known.get("head_dim")) and width * heads != known["hidden_size"]:
        attention["head_width"] = width
    if family == "qwen2":
        attention["qkv_bias"] = True
    if family == "qwen3":
        attention["qk_norm"] = True
    windowed = _windowed(known, depth)
    if windowed:
        attention["window"] = known["sliding_window"]
        attention["full_layers"] = [i for i in range(depth) if i not in windowed]
    return {
        "vocab": known["vocab_size"],
        "width": known["hidden_size"],
        "depth": depth,
        "context": known["max_position_embeddings"],
        "norm": "rmsnorm",
        "norm_eps": known["rms_norm_eps"],
        "position": "rope",
        "rope_theta": float(rope.get("rope_theta") or known.get("rope_theta") or 10_000.0),
        "rope_scaling": _scaling(scaling, known),
        "attention": attention,
        "mlp": {"activation": "swiglu" if gated else "relu2", "hidden": known["intermediate_size"]},
        "tied": known["tie_word_embeddings"],
        "bias": False,
        "init_std": known["initializer_range"],
    }


def _gpt2(known: Json) -> dict[str, Any]:
    odd = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, usual in odd.items():
        if known.get(key, usual) != usual:
            raise Unlike(f"its {key} is {known[key]}")
    if known["activation_function"] not in ACTIVATIONS or not known["tie_word_embeddings"]:
        raise Unlike(f"its activation is {known['activation_function']}, or its head is not its embedding")
    return {
        "vocab": known["vocab_size"],
        "width": known["n_embd"],
        "depth": known["n_layer"],
        "context": known["n_positions"],
        "norm": "layernorm",
        "norm_eps": known["layer_norm_epsilon"],
        "position": "learned",
        "attention": {"heads": known["n_head"]},
        "mlp": {"activation": ACTIVATIONS[known["activation_function"]], "hidden": known.get("n_inner")},
        "tied": True,
        "bias": True,
        "init_std": known["initializer_range"],
    }


def _windowed(known: Json, depth: int) -> set[int]:
    """The layers that see a window only."""
    if not known.get("sliding_window"):
        return set()
    if kinds := known.get("layer_types"):
        if odd := set(kinds) - {"full_attention", "sliding_attention"}:
            raise Unlike(f"its layers are {', '.join(sorted(odd))}")
        return {i for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    return set(range(known["max_window_layers"], depth)) if known["use_sliding_window"] else set()


def _scaling(said: Json, known: Json) -> dict[str, Any] | None:
    kind = said.get("rope_type") or said.get("type") or "default"
    if said.get("partial_rotary_factor", 1.0) != 1.0:
        raise Unlike("it turns a part of each head only (partial_rotary_factor)")
    if kind == "default":
        return None
    if kind == "linear":
        return {"kind": "linear", "factor": float(said["factor"])}
    original = said.get("original_max_position_embeddings") or known["max_position_embeddings"]
    if kind == "llama3":
        turns = {"low": float(said["low_freq_factor"]), "high": float(said["high_freq_factor"])}
        return {"kind": "llama3", "factor": float(said["factor"]), "original": original, **turns}
    if kind == "yarn" and not (said.get("mscale") or said.get("mscale_all_dim")):
        return {
            "kind": "yarn",
            "factor": float(said["factor"]),
            "original": original,
            "low": float(said.get("beta_slow") or 1),
            "high": float(said.get("beta_fast") or 32),
            "attention": said.get("attention_factor"),
            "truncate": said.get("truncate", True),
        }
    raise Unlike(f"its rotary embeddings are scaled by {kind}")


def _scaled(scaling: Any, theta: float) -> dict[str, Any]:
    """What older and newer transformers read."""
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    said: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        said["original_max_position_embeddings"] = scaling.original
    if scaling.kind == "llama3":
        said |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        said |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        said |= {} if scaling.attention is None else {"attention_factor": scaling.attention}
    return {"rope_scaling": said, "rope_parameters": {**said, "rope_theta": theta}}
