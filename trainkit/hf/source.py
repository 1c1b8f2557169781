"""Where a model of someone else's lies, and what it is: a folder, a GGUF file, or a name on the Hugging Face hub."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import xxhash

from trainkit.errors import UserError
from trainkit.hf import gguf, peft, sentences
from trainkit.hf.weights import files
from trainkit.strict import one_line, parse_json, read_file, reason

PREFIX = "hf:"
CONFIG = "config.json"
MAX_JSON = 16 << 20
# what is fetched of a model: its words and its safetensors, and never code or pickles
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?:@[\w./-]+)?")


def is_source(words: str | None) -> bool:
    """Whether `start_from` names one, rather than a checkpoint of a run."""
    return words is not None and words.startswith(PREFIX)


def located(name: str) -> Path:
    """The folder of `name`: itself, what a GGUF file was turned into, or the hub's snapshot (`OWNER/MODEL[@REVISION]`),
    which is fetched once.

    Raises:
        UserError: it is not there, or cannot be had.
    """
    name = name.removeprefix(PREFIX)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return gguf.converted(path, _cache())
    if path.is_dir():
        if not (path / CONFIG).is_file() and not peft.is_adapter(path):
            raise UserError(f"{path} is no model's folder: it holds no {CONFIG}")
        return path
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise UserError(f"model.name={name} is no folder with a {CONFIG}, no GGUF file and no OWNER/MODEL of the hub")
    return _fetched(name)


def config_of(folder: Path) -> dict[str, Any]:
    """What the config.json of a folder says.

    Raises:
        UserError: it is none, or of weights that are quantized already.
    """
    try:
        value = parse_json(read_file(folder / CONFIG, MAX_JSON), max_bytes=MAX_JSON)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
        raise UserError(f"{folder / CONFIG} names no model_type")
    if "quantization_config" in value:
        raise UserError(
            f"{folder} holds quantized weights: give the model as it was before, and model.adapter=qlora to hold it in 4 bits"
        )
    return value


def base_of(folder: Path) -> Path:
    """The folder of a model; of an adapter, that of the model which it is beside."""
    if not peft.is_adapter(folder):
        return folder
    name = peft.config_of(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / peft.CONFIG} does not say which model it is beside (base_model_name_or_path)")
    return located(name)


def identity(folder: Path) -> str:
    """What a model is, wherever it lies: its folder's name, and a hash of its config and of all its weights."""
    digest = hashlib.sha256()
    if peft.is_adapter(folder):
        digest.update(_content(folder / peft.CONFIG) + _content(folder / peft.FILE))
        base = base_of(folder)
    else:
        base = folder
    digest.update(json.dumps(config_of(base), sort_keys=True).encode())
    said = sentences.read(base)
    for file in [*files(base), *([said.dense] if said and said.dense else [])]:
        digest.update(_content(file))
    return f"{PREFIX}{_short(folder)}@{digest.hexdigest()[:16]}"


def _short(folder: Path) -> str:
    """A folder's name in a person's words: of the hub's cache, models--OWNER--MODEL/snapshots/REVISION, the model's."""
    parts = folder.absolute().parts
    cached = next((part for part in reversed(parts) if part.startswith("models--")), None)
    return re.sub(r"[^A-Za-z0-9._+-]", "-", (cached or parts[-1]).rpartition("--")[2]) or "model"


def label(name: str) -> str:
    """What a run that begins with `name` is called if nobody says."""
    bare = name.removeprefix(PREFIX).rstrip("/").partition("@")[0].rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._+-]", "-", bare).lstrip("._+-")[:64] or "hf"


def _content(file: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(8 << 20):
            digest.update(block)
    return digest.digest()


def _fetched(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"{name} is on the Hugging Face hub: pip install 'trainkit[hf]'") from error
    repository, _, revision = name.partition("@")
    try:
        endpoint = os.environ.get("HF_ENDPOINT")
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=WANTED, endpoint=endpoint))
    except Exception as error:  # whatever a download raises
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            one_line(f"model.name={name} is no folder here, and could not be had of the hub: {why}")
        ) from error


def _cache() -> Path:
    return Path(os.environ.get("TRAINKIT_CACHE") or Path.home() / ".cache" / "trainkit")
