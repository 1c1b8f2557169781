"""Folders of sentence-transformers, both ways: beside a model's own files, modules.json says how its tokens' vectors become
one (Reimers & Gurevych 2019, arXiv:1908.10084)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.errors import UserError
from trainkit.strict import parse_json, read_file, reason

MODULES, TRANSFORMER, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLING, DENSE, NORMALIZE, STATIC = "Pooling", "Dense", "Normalize", "StaticEmbedding"
OURS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # their ways to pool, of which one is taken
OLDER = {
    f"pooling_mode_{name}": name for name in ("lasttoken", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
}
OLDER |= {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
IDENTITY = "torch.nn.modules.linear.Identity"
MAX_JSON = 1 << 20


@dataclass(frozen=True)
class Sentences:
    """How a folder's model makes a vector of a text: its `pooling`, then the matrix in `dense`, a file, of `projection` rows.
    `length` is the longest text in ids, and `prompt` goes before each."""

    pooling: str
    projection: int | None = None
    dense: Path | None = None
    length: int | None = None
    prompt: str = ""


def read(folder: Path) -> Sentences | None:
    """What modules.json of a folder says; None where there is none.

    Raises:
        UserError: it is no chain of a transformer, a pooling and at most one matrix.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = _json(folder / MODULES)
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise UserError(f"{folder / MODULES} is no list of modules")
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    places = {kind: folder / str(m.get("path") or "") for kind, m in zip(kinds, modules, strict=True)}
    middle = [kind for kind in kinds[1:] if kind != NORMALIZE]  # vectors have length 1 here, with it or without
    if kinds[:1] != ["Transformer"] or middle not in ([POOLING], [POOLING, DENSE]) or places["Transformer"] != folder:
        raise UserError(
            f"{folder} makes vectors by {' and '.join(kinds)}, and what is read here is a Transformer in the folder "
            f"itself, Pooling, and at most one Dense"
        )
    known, said = _json(folder / TRANSFORMER), _json(folder / PROMPTS)
    if known.get("do_lower_case") and '"lowercase":true' not in _bare(folder / "tokenizer.json"):
        raise UserError(
            f"{folder / TRANSFORMER} makes texts lower-case, and its tokenizer does not: that is not read here"
        )
    prompts = said.get("prompts") or {}
    prompt = str(prompts.get(said.get("default_prompt_name")) or "")
    projection, dense = _dense(places[DENSE]) if DENSE in middle else (None, None)
    return Sentences(_pooling(places[POOLING], prompt), projection, dense, _length(folder, known), prompt)


def matrix(found: Sentences) -> Any:
    """The (projection, width) matrix of a folder that has one."""
    from safetensors.torch import load_file

    assert found.dense is not None
    return load_file(found.dense)["linear.weight"]


def files(pooling: str, width: int, into: int | None, length: int, prompts: Sequence[str]) -> dict[str, bytes]:
    """modules.json and what belongs to it, by name. Vectors of `width` numbers are pooled, and `into` so many projected, whose
    matrix is `2_Dense/model.safetensors`; `prompts` are those before an anchor and before what belongs to it."""
    theirs = {ours: name for name, ours in OURS.items()}[pooling]
    chain = ["Transformer", POOLING, *([DENSE] if into else []), NORMALIZE]
    modes = {key: OLDER[key] == theirs for key in OLDER}
    made: dict[str, Any] = {
        **chained(chain, prompts),
        TRANSFORMER: {"max_seq_length": length, "do_lower_case": False},
        f"1_{POOLING}/config.json": {"word_embedding_dimension": width, **modes},
    }
    if into:
        dense = {"in_features": width, "out_features": into, "bias": False, "activation_function": IDENTITY}
        made[f"2_{DENSE}/config.json"] = dense
    return encoded(made)


def static_files(into: int | None, width: int, prompts: Sequence[str]) -> dict[str, bytes]:
    """Those of a table of vectors, one a token, of which a text's are averaged."""
    made = chained([STATIC, *([DENSE] if into else []), NORMALIZE], prompts)
    if into:
        dense = {"in_features": width, "out_features": into, "bias": False, "activation_function": IDENTITY}
        made[f"1_{DENSE}/config.json"] = dense
    return encoded(made)


def chained(kinds: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
    """modules.json of modules in that order, and the prompts."""
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    named = dict(zip(("query", "document"), (*prompts, *prompts[-1:]), strict=False))
    return {
        MODULES: entries,
        PROMPTS: {"prompts": named, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    }


def encoded(made: Mapping[str, Any]) -> dict[str, bytes]:
    """Values as the JSON of files."""
    return {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in made.items()}


def _pooling(folder: Path, prompt: str) -> str:
    said = _json(folder / "config.json")
    modes = said.get("pooling_mode") or [name for key, name in OLDER.items() if said.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in OURS:
        raise UserError(f"{folder} pools by {' and '.join(map(str, modes))}: what is known here is {', '.join(OURS)}")
    if prompt and said.get("include_prompt") is False:
        raise UserError(f"{folder} leaves its prompt out of the mean (include_prompt), which is not done here")
    return OURS[modes[0]]


def _dense(folder: Path) -> tuple[int, Path]:
    said = _json(folder / "config.json")
    if said.get("bias", True) or said.get("activation_function") != IDENTITY or said.get("use_residual"):
        raise UserError(
            f"{folder} is more than a matrix: a bias, an activation or a residual, which task.projection lacks"
        )
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} holds no model.safetensors")
    return int(said["out_features"]), file


def _length(folder: Path, known: Mapping[str, Any]) -> int | None:
    """The longest text in ids, where the folder says one."""
    found = known.get("max_seq_length") or _json(folder / "tokenizer_config.json").get("model_max_length")
    return int(found) if isinstance(found, int) and found < 1 << 24 else None


def _bare(file: Path) -> str:
    """A file's text without spaces."""
    return "".join(file.read_text(encoding="utf-8").split()) if file.is_file() else ""


def _json(file: Path) -> Any:
    if not file.is_file():
        return {}
    try:
        return parse_json(read_file(file, MAX_JSON), max_bytes=MAX_JSON, max_nodes=1 << 16)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from error
