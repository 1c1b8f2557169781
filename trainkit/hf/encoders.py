"""A config.json of an encoder as the fields of our decoder that looks both ways, and back.

BERT (Devlin et al. 2019, arXiv:1810.04805), RoBERTa and XLM-R (Liu et al. 2019, arXiv:1907.11692), whose positions begin
behind the padding's, ModernBERT (Warner et al. 2024, arXiv:2412.13663) and EuroBERT (Boizard et al. 2025, arXiv:2503.05500).
"""

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]
BERT = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "pad_token_id": 0,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # what a config.json of the family leaves out
    "bert": BERT,
    "roberta": {**BERT, "pad_token_id": 1},
    "xlm-roberta": {**BERT, "pad_token_id": 1},
    "modernbert": {
        "hidden_activation": "gelu",
        "norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
    },
    "eurobert": {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    },
}
OFFSET = ("roberta", "xlm-roberta")  # the first position has the number behind the padding's
BIASES = ("attention_bias", "mlp_bias", "norm_bias")
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class Unlike(ValueError):
    """What a config.json says that our decoder is not."""


def fields(given: Json) -> dict[str, Any]:
    """The decoder's fields of an encoder's config.json, as YAML would hold them.

    Raises:
        Unlike: it is another architecture than our decoder can be, and why.
        KeyError: it lacks a key.
    """
    family = given["model_type"]
    known = {**DEFAULTS[family], **given}
    if odd := next((key for key in BIASES if known.get(key)), None):
        raise Unlike(f"its {odd} is true")
    return {"modernbert": _modernbert, "eurobert": _eurobert}.get(family, _bert)(known)


def config(decoder: Any) -> dict[str, Any]:
    """The config.json of a decoder that looks both ways, without its dtype and special tokens.

    Raises:
        Unlike: no architecture of transformers is it, and why.
    """
    it, heads = decoder, decoder.attention
    _, groups, k = heads.shape(it.width)
    same_heads = groups == heads.heads and k * heads.heads == it.width
    if heads.qk_norm or heads.qkv_bias not in (None, it.bias):
        raise Unlike("no encoder of theirs has model.attention.qk_norm, or model.attention.qkv_bias unlike model.bias")
    shape = {
        "vocab_size": it.vocab,
        "hidden_size": it.width,
        "intermediate_size": it.mlp.width(it.width),
        "num_hidden_layers": it.depth,
        "num_attention_heads": heads.heads,
        "max_position_embeddings": it.context,
        "initializer_range": it.init_std,
    }
    kind = (it.norm, it.position, it.bias, it.post_norm, it.embed_norm)
    plain = it.rope_scaling is None and it.window_theta is None
    if kind == ("layernorm", "learned", True, True, True) and it.mlp.activation in GELU.values():
        if not same_heads or heads.window:
            raise Unlike("BERT has one key head for each query head, and no window")
        return shape | {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu" if it.mlp.activation == "gelu" else "gelu_new",
            "hidden_dropout_prob": it.dropout,
            "attention_probs_dropout_prob": it.dropout,
            "layer_norm_eps": it.norm_eps,
            "type_vocab_size": 2,
        }
    if kind == ("layernorm", "rope", False, False, True) and it.mlp.activation == "geglu":
        if not same_heads or it.rope_scaling is not None:
            raise Unlike("ModernBERT has one key head for each query head, and no model.rope_scaling")
        kinds = ["sliding_attention" if heads.window_of(i) else "full_attention" for i in range(it.depth)]
        thetas = {"full_attention": it.rope_theta, "sliding_attention": it.window_theta or it.rope_theta}
        return shape | {
            "architectures": ["ModernBertModel"],
            "model_type": "modernbert",
            "hidden_activation": "gelu",
            "norm_eps": it.norm_eps,
            "layer_types": kinds,
            "local_attention": 2 * ((heads.window or 65) - 1),
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
            **{f"{part}_dropout": it.dropout for part in ("attention", "mlp", "embedding")},
        }
    if (
        kind == ("rmsnorm", "rope", False, False, False)
        and it.mlp.activation == "swiglu"
        and plain
        and not heads.window
    ):
        return shape | {
            "architectures": ["EuroBertModel"],
            "model_type": "eurobert",
            "num_key_value_heads": groups,
            "head_dim": k,
            "hidden_act": "silu",
            "rms_norm_eps": it.norm_eps,
            "tie_word_embeddings": it.tied,
            "attention_dropout": it.dropout,
            "rope_theta": it.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": it.rope_theta},
        }
    raise Unlike(
        f"none looks both ways and has model.norm={it.norm}, model.position={it.position}, model.bias={it.bias} and "
        f"model.mlp.activation={it.mlp.activation} together, with what else this one has"
    )


def _bert(known: Json) -> dict[str, Any]:
    if known.get("is_decoder") or known.get("add_cross_attention"):
        raise Unlike("it is a decoder of BERT's kind")
    if known.get("position_embedding_type", "absolute") != "absolute":
        raise Unlike(f"its positions are {known['position_embedding_type']}")
    if known["hidden_act"] not in GELU:
        raise Unlike(f"its hidden_act is {known['hidden_act']}")
    return {
        **_shape(known),
        "context": known["max_position_embeddings"] - skipped(known),
        "norm": "layernorm",
        "norm_eps": known["layer_norm_eps"],
        "position": "learned",
        "post_norm": True,
        "embed_norm": True,
        "attention": {"heads": known["num_attention_heads"], "causal": False},
        "mlp": {"activation": GELU[known["hidden_act"]], "hidden": known["intermediate_size"]},
        "bias": True,
    }


def skipped(known: Json) -> int:
    """How many positions of a model come before that of a text's first token."""
    family = known["model_type"]
    return int(known.get("pad_token_id", DEFAULTS[family]["pad_token_id"])) + 1 if family in OFFSET else 0


def _modernbert(known: Json) -> dict[str, Any]:
    if known["hidden_activation"] not in GELU or GELU[known["hidden_activation"]] != "gelu":
        raise Unlike(f"its hidden_activation is {known['hidden_activation']}")
    every, depth = known["global_attn_every_n_layers"], known["num_hidden_layers"]
    kinds = known.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(depth)]
    full, local = _theta(known, "full_attention", "global", 160_000.0), _theta(known, "sliding_attention", "local", 1e4)
    windowed = "sliding_attention" in kinds
    window = {"window": known["local_attention"] // 2 + 1} if windowed else {}
    if windowed:
        window["full_layers"] = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    return {
        **_shape(known),
        "context": known["max_position_embeddings"],
        "norm": "layernorm",
        "norm_eps": known["norm_eps"],
        "position": "rope",
        "rope_theta": full,
        "window_theta": local if windowed else None,
        "embed_norm": True,
        "attention": {"heads": known["num_attention_heads"], "causal": False, **window},
        "mlp": {"activation": "geglu", "hidden": known["intermediate_size"]},
        "bias": False,
    }


def _theta(known: Json, kind: str, older: str, default: float) -> float:
    """How fast positions turn in layers of a kind, by the newer or the older word for it."""
    said = (known.get("rope_parameters") or {}).get(kind) or {}
    if said.get("rope_type", "default") != "default":
        raise Unlike(f"its rotary embeddings are scaled by {said['rope_type']}")
    return float(said.get("rope_theta") or known.get(f"{older}_rope_theta") or default)


def _eurobert(known: Json) -> dict[str, Any]:
    if known["hidden_act"] not in ("silu", "swish"):
        raise Unlike(f"its hidden_act is {known['hidden_act']}")
    rope = known.get("rope_parameters") or known.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise Unlike(f"its rotary embeddings are scaled by {rope.get('rope_type') or rope.get('type')}")
    heads = known["num_attention_heads"]
    attention = {"heads": heads, "kv_heads": known.get("num_key_value_heads") or heads, "causal": False}
    if (width := known.get("head_dim")) and width * heads != known["hidden_size"]:
        attention["head_width"] = width
    return {
        **_shape(known),
        "context": known["max_position_embeddings"],
        "norm": "rmsnorm",
        "norm_eps": known["rms_norm_eps"],
        "position": "rope",
        "rope_theta": float(rope.get("rope_theta") or known.get("rope_theta") or 10_000.0),
        "attention": attention,
        "mlp": {"activation": "swiglu", "hidden": known["intermediate_size"]},
        "bias": False,
    }


def _shape(known: Json) -> dict[str, Any]:
    """What every family calls the same. A head is not read: its task has one of its own, or none."""
    return {
        "vocab": known["vocab_size"],
        "width": known["hidden_size"],
        "depth": known["num_hidden_layers"],
        "tied": True,
        "init_std": known["initializer_range"],
    }
