"""A conversation as the text that a model was taught to read, and which parts of it an assistant wrote.

A chat template is Jinja, in a sandbox whose values it cannot change: what transformers does with it, too. It is told no
date, so that a conversation is the same text every day.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainkit.errors import UserError
from trainkit.strict import one_line

Message = Mapping[str, Any]
ASSISTANT = "assistant"
_BEGIN, _END = "\ufdd0", "\ufdd1"  # no characters, and never will be: they mark what a template calls generated
_MARK = re.compile(f"[{_BEGIN}{_END}]")


def rendered(template: str, words: Mapping[str, str], messages: Sequence[Message], *, reply: bool = False) -> str:
    """The text of a conversation; with `reply` up to where the assistant's next words begin.

    Raises:
        UserError: the template refuses these messages, or is none.
    """
    return _MARK.sub("", _rendered(template, words, messages, reply))


def with_spans(
    template: str, words: Mapping[str, str], messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where in it an assistant wrote, as (begin, end) in characters.

    They are what the template itself marks (`{% generation %}`), or else what each of its messages adds to the text that
    asks for it.

    Raises:
        UserError: neither, because the template writes earlier messages in another way once a later one is there.
    """
    whole = _rendered(template, words, messages, reply=False)
    if _BEGIN in whole:
        return _unmarked(whole)
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") == ASSISTANT:
            asked = _rendered(template, words, messages[:i], reply=True)
            answered = _rendered(template, words, messages[: i + 1], reply=False)
            if not answered.startswith(asked) or not whole.startswith(answered.rstrip()):
                raise UserError(
                    "this chat template writes a conversation's beginning in another way when more follows, so that it cannot "
                    "be known what the assistant wrote: mark it with {% generation %} in the template, or use data.learn=all"
                )
            spans.append((len(asked), min(len(answered), len(whole))))
    return whole, spans


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    spans, begin = [], 0
    for removed, mark in enumerate(_MARK.finditer(text)):
        place = mark.start() - removed
        if mark[0] == _BEGIN:
            begin = place
        else:
            spans.append((begin, place))
    return _MARK.sub("", text), spans


def _rendered(template: str, words: Mapping[str, str], messages: Sequence[Message], reply: bool) -> str:
    tokens = {f"{kind}_token": token for kind, token in words.items() if kind != "template"}
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=reply, **tokens)
    except TemplateError as error:
        raise UserError(one_line(f"the chat template cannot be used: {error}")) from error
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(one_line(f"the chat template cannot write such messages: {error}")) from error


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant writes, by which transformers knows it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block with a mark before and behind it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # without HTML's escapes, which Jinja's own adds


def _refuse(message: str) -> None:
    raise TemplateError(message)
