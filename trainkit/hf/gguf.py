"""A GGUF file as a folder of safetensors, made once and kept: transformers reads it, and its numbers become float32."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash

from trainkit.errors import UserError
from trainkit.strict import one_line


def converted(file: Path, cache: Path) -> Path:
    """The folder that holds what the file does, with its tokenizer and chat template.

    Raises:
        UserError: there is no such file, a library is missing, or transformers cannot read it.
    """
    if not file.is_file():
        raise UserError(f"there is no {file}")
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(8 << 20):
            digest.update(block)
    kept = cache / "gguf" / digest.hexdigest() / file.stem
    if kept.is_dir():
        return kept
    made = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    made.mkdir(parents=True, exist_ok=True)
    try:
        _write(file, made)
        made.rename(kept)
    except OSError as error:
        if not kept.is_dir():  # else another process was first
            raise UserError(f"{cache} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return kept


def _write(file: Path, folder: Path) -> None:
    for library in ("transformers", "gguf", "accelerate"):  # it says so too late, and otherwise
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{file} is read by transformers, which needs {library}: pip install 'trainkit[hf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # whatever a damaged or an unknown file makes of it
        raise UserError(one_line(f"{file} cannot be read by transformers: {error}")) from error
    finally:
        logging.enable_progress_bar()
    said = read.config.to_dict()
    said.pop("quantization_config", None)
    plain = type(read)(type(read.config).from_dict(said))  # one that was read from a GGUF file refuses to be saved
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    _name_specials(file, tokenizer)
    tokenizer.save_pretrained(folder)


def _name_specials(file: Path, tokenizer: Any) -> None:
    """Give a tokenizer the special tokens and the chat template that its file names, where transformers passed them over."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    for kind in ("bos", "eos", "pad"):
        field = reader.get_field(f"tokenizer.ggml.{kind}_token_id")
        if field is not None and getattr(tokenizer, f"{kind}_token") is None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(int(field.contents())))
    template = reader.get_field("tokenizer.chat_template")
    if template is not None and not tokenizer.chat_template:
        tokenizer.chat_template = template.contents()
