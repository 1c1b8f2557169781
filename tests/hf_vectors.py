"""Encoders of transformers with random weights, and a text's vector as their own library makes it."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from tests.conftest import TEXT

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
WINDOW = {"local_attention": 6, "global_attn_every_n_layers": 3, "cls_token_id": 2, "sep_token_id": 3}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "bert-tanh": ("Bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1}),
    "modernbert": ("ModernBert", WINDOW),
    "modernbert-old": ("ModernBert", {**WINDOW, "global_rope_theta": 500.0, "local_rope_theta": 20.0}),
    "eurobert": ("EuroBert", {"num_key_value_heads": 2, "rope_theta": 300.0}),
}


def made(kind: str, head: str = "Model") -> nn.Module:
    """A model of transformers in whose numbers every part shows."""
    family, more = KINDS[kind]
    said = getattr(transformers, f"{family}Config")(**{**SHAPE, **more})
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}{head}")(said).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name.lower()), std=0.3)
    return model


def words() -> str:
    """A tokenizer.json of whole words between [CLS] and [SEP]."""
    known = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *dict.fromkeys(TEXT.replace(";", "").replace(".", "").split()),
    ]
    fast = Tokenizer(models.WordPiece({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))  # type: ignore[call-arg]
    fast.normalizer, fast.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.add_special_tokens(known[:5])
    fast.enable_truncation(9)
    fast.enable_padding(length=9)
    return fast.to_str()


def folder(kind: str, place: Path, pooling: str = "mean", dense: int | None = None, head: str = "Model") -> Path:
    """A folder of sentence-transformers, as it writes it."""
    where = place / kind
    made(kind, head).save_pretrained(where)
    (where / "tokenizer.json").write_text(words())
    said = {"sep_token": "[SEP]", "cls_token": "[CLS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (where / "tokenizer_config.json").write_text(
        json.dumps({**said, "model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    paths = [f"{i}_{kind}" if i else "" for i, kind in enumerate(kinds)]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))]  # fmt: skip
    (where / "modules.json").write_text(json.dumps(modules))
    (where / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    (where / "1_Pooling").mkdir()
    (where / "1_Pooling/config.json").write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": pooling}))
    if dense:
        from safetensors.torch import save_file

        (where / "2_Dense").mkdir()
        said = {"in_features": 32, "out_features": dense, "bias": False}  # type: ignore[dict-item]
        said["activation_function"] = "torch.nn.modules.linear.Identity"
        (where / "2_Dense/config.json").write_text(json.dumps(said))
        save_file({"linear.weight": torch.randn(dense, 32)}, where / "2_Dense/model.safetensors")
    return where


LINES = ["the quick brown fox", "", "pack my box with five dozen liquor jugs and a lazy dog over the", "Dog"]
