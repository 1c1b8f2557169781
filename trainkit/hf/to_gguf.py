"""A model as one GGUF file, for llama.cpp and what is built on it. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainkit.errors import UserError

FAMILIES = ("llama", "qwen2", "qwen3")
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"} | {
    "lm_head.weight": "output.weight"
}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FORMS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
NORMAL, CONTROL = 1, 3  # kinds of tokens
SPLITS = {"\\p{N}{1,3}": "llama-bpe", "\\p{N}": "qwen2"}  # by what a pattern says of digits


def check(config: Mapping[str, Any]) -> None:
    """Refuse what cannot be written before anything is.

    Raises:
        UserError: gguf is missing, or the architecture is none that is known here.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--gguf needs the gguf library: pip install 'trainkit[hf]'")
    family = config.get("model_type")
    if family not in FAMILIES or config.get("use_sliding_window"):
        raise UserError(f"--gguf writes {', '.join(FAMILIES)} without a window, and this is {family}")
    if config.get("rope_scaling"):
        raise UserError("--gguf writes no scaled rotary embeddings: leave model.rope_scaling out")


def write(
    file: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: str,
    ends: Mapping[str, int],
    template: str | None,
    form: str,
    name: str,
) -> None:
    """Write a model and its tokenizer.json. Matrices are in `form` (fp32, fp16, bf16, q8_0), all else in float32."""
    import gguf

    writer = gguf.GGUFWriter(file, config["model_type"])
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    kind = gguf.GGMLQuantizationType[FORMS[form]]
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[{"fp32": "ALL_F32"}.get(form, f"MOSTLY_{FORMS[form]}")])
    _tokenizer(writer, json.loads(tokenizer), config["vocab_size"], ends, template)
    for theirs, tensor in tensors.items():
        wide = tensor.float()
        if config["model_type"] == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            wide = _paired(wide, heads if "q_proj" in theirs else groups)
        used = kind if wide.ndim == 2 and (form != "q8_0" or wide.shape[1] % 32 == 0) else gguf.GGMLQuantizationType.F32
        array = gguf.quants.quantize(wide.numpy(), used)
        writer.add_tensor(_name(theirs), array, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(theirs: str) -> str:
    if theirs in ENDS:
        return ENDS[theirs]
    _, _, number, rest = theirs.split(".", 3)
    part, _, kind = rest.rpartition(".")
    return f"blk.{number}.{PARTS[part]}.{kind}"


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows so that the two numbers which are turned together stand side by side, as llama.cpp's LLaMA has them."""
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _tokenizer(writer: Any, said: Mapping[str, Any], vocab: int, ends: Mapping[str, int], template: str | None) -> None:
    model = said["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps([said.get("pre_tokenizer"), said.get("decoder")]):
        raise UserError("--gguf writes byte-level BPE tokenizers, and this model has another kind")
    if not model["merges"]:
        raise UserError("--gguf writes tokenizers that merge bytes, and this one reads them one by one")
    ids = dict(model["vocab"])
    added = {token["content"]: token["id"] for token in said.get("added_tokens") or []}
    tokens, kinds = [f"[UNUSED{i}]" for i in range(vocab)], [NORMAL] * vocab
    for token, i in (ids | added).items():
        tokens[i] = token
        kinds[i] = CONTROL if token in added else NORMAL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    pattern = json.dumps(said.get("pre_tokenizer"))
    writer.add_tokenizer_pre(
        next((pre for digits, pre in SPLITS.items() if json.dumps(digits)[1:-1] in pattern), "gpt-2")
    )
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "pad"):
        if (end := ends.get(f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(end)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
