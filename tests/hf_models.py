"""Models of transformers with random weights, in folders of their own."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from tests.conftest import SMALL
from trainkit import build
from trainkit import run as runs

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2, "head_dim": 12}),
    "llama3": (
        "Llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 24}, "head_dim": 16},
    ),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}}),
    "yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 100.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 3.0,
            },
            "head_dim": 32,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", WINDOW),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-wide": ("Qwen3", {"head_dim": 128, "num_hidden_layers": 2}),  # as transformers reads of a GGUF file
    "arcee": ("Arcee", {}),
    "gpt2": ("GPT2", {}),
}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 8}),
    "llama-bias": ("Llama", {"attention_bias": True}),
}


def made(kind: str) -> nn.Module:
    """A model of transformers in whose numbers every part shows."""
    family, more = (KINDS | FOREIGN)[kind]
    own = {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 40}
    said = getattr(transformers, f"{family}Config")(**(own if family == "GPT2" else {**BASE, **more}))
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(3)
    model = getattr(transformers, name)(said).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def text_tokenizer(size: int = 300) -> str:
    """A tokenizer.json of bytes, with ids of its own order, and special tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate(bytes_)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return fast.to_str()


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def folder(kind: str, place: Path, tokenizer: bool = True) -> Path:
    """A model's folder as `save_pretrained` writes it."""
    made(kind).save_pretrained(place / kind)
    if tokenizer:
        (place / kind / "tokenizer.json").write_text(text_tokenizer())
        start = {"__type": "AddedToken", "content": "<|im_start|>"}
        words = {"eos_token": "<|im_end|>", "bos_token": start, "chat_template": TEMPLATE}
        (place / kind / "tokenizer_config.json").write_text(json.dumps(words))
    return place / kind


def begun(kind: str, place: Path, *overrides: str) -> build.Trainer:
    """A run that has a folder's weights and has not begun."""
    where = folder(kind, place)
    small = [word for word in SMALL if not word.startswith("model.")]
    run = runs.composed([*small, "model=hf", f"model.name={where}", *overrides, "name=t"])
    with build.trainer(run, Path("runs/t")) as trainer:
        return trainer


def ids(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 258, (rows, length), generator=torch.Generator().manual_seed(5))
