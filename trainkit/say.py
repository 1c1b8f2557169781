"""Writing with a checkpoint, or with somebody's model: the verb `generate`."""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit import hardware
from trainkit.data import chat
from trainkit.errors import UserError
from trainkit.learner import load_model
from trainkit.opened import opened, tokenizer_of
from trainkit.sampling import stream, texts
from trainkit.strict import reason
from trainkit.use import quantized, refuse_format

STDIN = "-"


def generate(
    which: str,
    prompt: str | None,
    root: Path,
    *,
    prompts: str | None,
    talk: bool,
    system: str | None,
    rows: int,
    device: str,
    quantize: str | None,
    **how: Any,
) -> None:
    """Write to stdout what the model goes on with: from one prompt as it comes, from a file's lines (`prompts`) as JSON
    lines, `rows` of them at once, or in a conversation (`talk`) whose words are the chat template's.

    Raises:
        UserError: there is no such checkpoint, or the words do not go together.
    """
    if prompts is not None and prompt is not None:
        raise UserError("--prompt is one prompt and --prompts a file of them: give one of the two")
    if system is not None and not talk:
        raise UserError("--system begins a conversation: give --chat with it")
    loaded, run = opened(which, root)
    refuse_format(quantize, run)
    if not run.task.writes:
        raise UserError(f"{run.name} has learned task={run.task.kind}, which writes no text")
    tokenizer, place = tokenizer_of(loaded), hardware.choose(device)
    model = run.task.build(run.model.build()).to(place)
    load_model(model, loaded.tensors)
    model = run.precision.to_use(place).apply(model, place).eval()
    quantized(model, quantize)
    how["context"] = run.model.context
    before = [] if system is None else [{"role": "system", "content": system}]
    if prompts is not None:
        for part in _parts(_lines(prompts), rows):
            given = [chat.prompt(tokenizer, [*before, _user(text)]) if talk else text for text in part]
            for text, written in zip(part, texts(model, tokenizer, given, **how), strict=True):
                print(json.dumps({"prompt": text, "text": written}, ensure_ascii=False), flush=True)
    elif talk:
        _converse(model, tokenizer, before, [prompt] if prompt is not None else _asked(), how)
    else:
        begin = "\n" if prompt is None else prompt
        _write(itertools.chain([begin], stream(model, tokenizer, begin, **how)))


def _converse(
    model: Any, tokenizer: Any, messages: Sequence[Mapping[str, str]], said: Iterable[str], how: Mapping[str, Any]
) -> None:
    """Answer each of what is said, remembering what went before."""
    for text in said:
        messages = [*messages, _user(text)]
        answer = _write(stream(model, tokenizer, chat.prompt(tokenizer, messages), **how))
        messages = [*messages, {"role": "assistant", "content": answer}]


def _asked() -> Iterator[str]:
    """A person's lines, until there are no more."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _write(pieces: Iterable[str]) -> str:
    whole = ""
    for text in pieces:
        whole += text
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return whole


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _lines(file: str) -> list[str]:
    if file == STDIN:
        return [line for line in sys.stdin.read().splitlines() if line.strip()]
    try:
        return [line for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {file} cannot be read: {reason(error)}") from error


def _parts(lines: Sequence[str], rows: int) -> Iterator[Sequence[str]]:
    for begin in range(0, len(lines), rows):
        yield lines[begin : begin + rows]
