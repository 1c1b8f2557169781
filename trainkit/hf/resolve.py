"""`model=hf model.name=X` as what it stands for: a model's own fields, X's weights to begin with, and X's tokenizer.

So that a run says what it is, and goes on where X is no longer to be had.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.errors import RefusedError, UserError
from trainkit.hf import encoders, families, peft, sentences, source

KIND = "hf"
OWN = ("kind", "name", "pretrained")
LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
FREE = ("adapter", "dropout", "init_std", "context")  # what a person may say of a model that is read


def resolved(tree: dict[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """`tree`, a composed run's, as it is; or where its model is somebody's, with what that is. `given` are the fields and the
    groups that a person gave.

    Raises:
        UserError: it names none, one that cannot be had, or a field that is the model's own to say.
    """
    model = tree.get("model") or {}
    if model.get("kind") != KIND or model.get("config"):
        return tree
    if not model.get("name"):
        raise UserError(
            "model.name is missing: a folder, a GGUF file or the hub's OWNER/MODEL, as in model=hf model.name=..."
        )
    for key in given:
        part = key.removeprefix("model.").split(".")[0]
        if key.startswith("model.") and part not in (*OWN, *FREE):
            raise RefusedError(f"{key} is what {model['name']} says itself: leave it out, or take another model=")
    folder = source.located(model["name"])
    base = source.base_of(folder)
    known = source.config_of(base)
    said = {key: value for key, value in model.items() if key in FREE}
    try:
        found: dict[str, Any] = {"kind": "decoder", **families.fields(known), **said}
    except families.Unlike as why:  # it is trained as transformers has it
        if tree["task"]["kind"] == "embedding":
            raise UserError(f"{model['name']} makes no vectors here: {why}") from why
        own = {key: value for key, value in model.items() if key in OWN}
        found = {**own, "config": known, "context": _context(known), **said}
    if base != folder:
        fused = found["kind"] == "decoder"
        found["adapter"] = {**peft.fields(folder, fused=fused), **_held(found.get("adapter"))}
    tree = {**tree, "model": found}
    if model.get("pretrained", True) and tree.get("start_from") is None:
        tree["start_from"] = f"{source.PREFIX}{model['name']}"
    if tree.get("name", "").startswith(f"{KIND}-") and "name" not in given:
        tree["name"] = source.label(model["name"]) + tree["name"].removeprefix(KIND)
    return _with_its_tokenizer(_as_vectors(tree, base, given), str(base), given)


def makes_vectors(name: str) -> int | None:
    """How many ids a text may have for a model of vectors, an encoder or a folder of sentence-transformers; None for others.

    Raises:
        UserError: it is not there.
    """
    folder = source.base_of(source.located(name))
    known, said = source.config_of(folder), sentences.read(folder)
    if said is None and known["model_type"] not in encoders.DEFAULTS:
        return None
    longest = _context(known) - (encoders.skipped(known) if known["model_type"] in encoders.OFFSET else 0)
    return min(longest, said.length or longest) if said else longest


def _as_vectors(tree: dict[str, Any], folder: Path, given: Sequence[str]) -> dict[str, Any]:
    """An embedding run that reads and pools texts as the folder says, but for what a person gave."""
    said = sentences.read(folder)
    encoder = not (tree["model"].get("attention") or {}).get("causal", True)
    if tree["task"]["kind"] != "embedding" or not (said or encoder):
        return tree
    own: dict[str, Any] = {"data.specials": "template"}
    if said:
        own |= {"task.pooling": said.pooling, "task.projection": said.projection}
        own |= {"data.prompts": [said.prompt]} if said.prompt else {}
    for key in own.keys() - set(given):
        group, _, name = key.partition(".")
        tree = {**tree, group: {**tree[group], name: own[key]}}
    return tree


def _held(adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a person may say of somebody's adapter: what the weights beside it are held in."""
    return {key: value for key, value in (adapter or {}).items() if key in ("quantize", "double_quantize")}


def _context(known: Mapping[str, Any]) -> int:
    """The longest row of a model, by whatever word its config has for it."""
    return next((known[key] for key in LENGTHS if isinstance(known.get(key), int)), 2048)


def _with_its_tokenizer(tree: dict[str, Any], folder: str, given: Sequence[str]) -> dict[str, Any]:
    """The data read with the model's tokenizer, unless a person names one or it is prepared already."""
    data = tree["data"]
    chosen = any(key.startswith("data.tokenizer") for key in given)
    if chosen or not isinstance(data, Mapping) or data.get("kind") not in READ_WITH_ONE:
        return tree
    return {**tree, "data": {**data, "tokenizer": {"kind": KIND, "path": folder}}}


# kinds of data whose `tokenizer` reads their text
READ_WITH_ONE = ("text", "mixture", "chat", "preferences", "pairs", "wordnet", "stsb")
