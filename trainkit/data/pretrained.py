"""A tokenizer that someone trained: a tokenizer.json, what a run's checkpoint carries, or a model's folder, which says more."""

import json
from pathlib import Path
from typing import Any

from trainkit.data.tokenizers import MAX_BYTES, MAX_NODES, JsonTokenizer, Tokenizer, load
from trainkit.errors import UserError
from trainkit.strict import one_line, parse_json, read_file, reason

FILE, CONFIG, SPECIAL, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
KINDS = ("eos", "bos", "pad", "unk", "cls", "sep", "mask")
MAX_WORDS = 16 << 20


def tokenizer_at(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a file alone, or a folder with its special tokens and its chat template.

    Raises:
        UserError: it is not there, or is none.
    """
    file = path / FILE if path.is_dir() else path
    if path.is_dir() and not file.exists():
        return _by_transformers(path)
    try:
        content = read_file(file, MAX_BYTES)
        text = content.decode()
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer.path={path} cannot be read: {reason(error)}") from error
    if _is_saved(text):
        return load(content)
    return JsonTokenizer(text, path.name, words(path) if path.is_dir() else None)


def words(folder: Path) -> dict[str, str]:
    """A folder's special tokens (`eos`, `bos`, ...) and its chat `template`, those that it names.

    Raises:
        UserError: a file of them is no JSON.
    """
    said = _json(folder / SPECIAL) | _json(folder / CONFIG)
    found = {kind: token for kind in KINDS if (token := _content(said.get(f"{kind}_token")))}
    template = said.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if (folder / TEMPLATE).is_file():
        try:
            template = read_file(folder / TEMPLATE, MAX_WORDS).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / TEMPLATE} cannot be read: {reason(error)}") from error
    return found | ({"template": template} if isinstance(template, str) else {})


def _is_saved(text: str) -> bool:
    """Whether it is `Tokenizer.save`'s JSON rather than the library's."""
    return text.lstrip()[:20].replace(" ", "").startswith('{"kind":')


def _content(token: Any) -> str | None:
    """A special token, which is a text or an object that holds one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = parse_json(read_file(file, MAX_WORDS), max_bytes=MAX_WORDS, max_nodes=MAX_NODES)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from error
    return value if isinstance(value, dict) else {}


def _by_transformers(folder: Path) -> Tokenizer:
    """Of a folder with an older tokenizer's files, what transformers makes of them: no code of the folder's runs."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(f"{folder} holds no {FILE}, and other files need pip install 'trainkit[hf]'") from error
    try:
        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = slow.backend_tokenizer.to_str()
    except Exception as error:  # whatever transformers raises where there is nothing
        raise UserError(
            one_line(f"{folder} holds no {FILE}, nor another tokenizer that can be read: {error}")
        ) from error
    found = {kind: str(token) for kind in KINDS if (token := getattr(slow, f"{kind}_token", None))}
    template = slow.chat_template
    more = {"template": template} if isinstance(template, str) else {}
    return JsonTokenizer(json.dumps(json.loads(text)), folder.name, found | more)
