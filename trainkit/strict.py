"""Files that anyone may have written, their JSON and YAML read as data alone, in bounded time and memory.

What two readers could take for two things is refused: a key that stands twice, NaN, tags, anchors. A reader that looks
for trouble before it builds anything cannot be made to recurse, to multiply or to run.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 64
MAX_YAML = 1 << 20  # bytes
NUMBER = 64  # characters: more than any float's shortest form or a 128-bit integer has

_JSON_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{},]', re.DOTALL)  # an open string ends with the text
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DIRECTIVE = re.compile("(?:^|[\ufeff\r\n\x85\u2028\u2029])%")  # a line that starts so is one, or inside a text
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS = {"": None, "~": None} | {
    form: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for form in (word, word.capitalize(), word.upper())
}
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML has it: some 20 times faster


def parse_json(raw: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH, max_nodes: int = 1_000_000) -> Any:
    """The value of a JSON document in UTF-8. `max_nodes` bounds how many values it holds, over all depths.

    Raises:
        ValueError: it is none, too large or too deep, a key stands twice in an object, a number is NaN, infinite or
            absurdly long, or a text holds half a surrogate pair; in one line.
    """
    if len(raw) > max_bytes:
        raise ValueError(f"it has {len(raw)} bytes, at most {max_bytes} were expected")
    try:
        text = bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    refuse_large(text, max_nodes=max_nodes, max_depth=max_depth)
    value = json.loads(
        text,
        object_pairs_hook=_no_key_twice,
        parse_constant=_no_such_number,
        parse_int=lambda digits: int(_short(digits)),
        parse_float=lambda digits: _finite(_short(digits)),
    )
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text in it holds half a surrogate pair") from error
    return value


def refuse_large(text: str, *, max_nodes: int, max_depth: int = MAX_DEPTH) -> None:
    """Raise ValueError where a JSON text nests too deep or holds too many values: before anything recurses or is made."""
    depth, nodes, texts = 0, 1, 0
    for match in _JSON_TOKEN.finditer(text):
        character = text[match.start()]
        if character == '"':
            texts += 1
        elif character == ",":
            nodes += 1
        elif character in "[{":
            nodes, depth = nodes + 1, depth + 1
            if depth > max_depth:
                raise ValueError(f"it is more than {max_depth} levels deep")
        else:
            depth -= 1
        if nodes > max_nodes or texts > 2 * max_nodes:  # a value has one key at most
            raise ValueError(f"it holds more than {max_nodes} values")


def parse_yaml(text: str, *, max_bytes: int = MAX_YAML, max_depth: int = MAX_DEPTH, max_nodes: int = 50_000) -> Any:
    """The value of one YAML document of mappings with texts for keys, sequences, and plain values.

    Plain words are those of YAML 1.2's core schema with decimal numbers only: `no`, `012`, `0x1f` and `12:30:45` are
    texts, `1e-4` is a number.

    Raises:
        ValueError: it is none, too large or too deep, has a tag, an anchor, an alias or a directive, a key stands twice
            or is no text, or a number cannot be held; in one line that says where.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"line {_line(text, error.start)}: half a surrogate pair") from error
    if size > max_bytes:
        raise ValueError(f"it has {size} bytes, at most {max_bytes} were expected")
    if found := _DIRECTIVE.search(text):  # before the parser sees it: many take libyaml a time that is quadratic
        raise ValueError(f"line {_line(text, found.end())}: a directive has no place here")
    builder = _Builder(max_depth, max_nodes)
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            builder.take(event)
    except yaml.reader.ReaderError as error:
        line, what = _line(text, error.position), _code(error.character)
        raise ValueError(f"line {line}: {what} is no character of YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(where + one_line(error.problem or error.context or "not YAML")) from error
    except (UnicodeError, OverflowError) as error:  # PyYAML's own, of escapes such as "\UFFFFFFFF"
        raise ValueError(f"line {builder.line}: {one_line(str(error))}") from error
    return builder.value


class _Writer(yaml.SafeDumper):
    """Writes no anchors, and quotes what `parse_yaml` would take for more than a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(writer: _Writer, text: str) -> Any:
    if not text.isprintable():  # a quoted line break may come back as a space
        style = '"'
    elif text in _WORDS or any(form.fullmatch(text) for form in (_INT, _FLOAT, _SPECIAL)):
        style = "'"
    else:
        style = None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Writer.add_representer(str, _write_text)


def write_yaml(value: Any) -> str:
    """The YAML document of nested dicts, lists and plain values that `parse_yaml` reads as `value` again."""
    written: str = yaml.dump(value, Dumper=_Writer, default_flow_style=False, allow_unicode=True, sort_keys=False)
    return written


def read_file(path: Path, max_bytes: int, *, follow: bool = True) -> bytes:
    """A regular file's content. With `follow=False` it may not be a link.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it is not a regular file, or longer than `max_bytes`.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe is not waited for
    with open(os.open(path, flags if follow else flags | os.O_NOFOLLOW), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it is longer than {max_bytes} bytes")
    return content


def reason(error: OSError | ValueError) -> str:
    """What an error of reading a file says, without the path that stands before it."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(str(error))


def one_line(text: str, limit: int = 300) -> str:
    """A text of anyone's as a message may quote it: on one line, nothing that a terminal obeys, cut at `limit`."""
    cut = text[: limit + 1]
    line = " ".join(cut.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(text) <= limit else line[:limit] + "..."


class _Builder:
    """Makes a value of a parser's events, with a stack of its own: depth costs memory, never a frame."""

    def __init__(self, max_depth: int, max_nodes: int) -> None:
        self.value: Any = None
        self.line = 1
        self._max_depth, self._left = max_depth, max_nodes
        self._max_nodes = max_nodes
        self._open: list[tuple[Any, list[str]]] = []  # a container, and in a mapping the key that waits for its value
        self._documents = 0

    def take(self, event: Any) -> None:
        """Add one event.

        Raises:
            ValueError: it is one that data does not need, or one too many.
        """
        self.line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._refuse("a second document")
        elif isinstance(event, yaml.AliasEvent):
            self._refuse("an alias")
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
        elif isinstance(event, yaml.NodeEvent):
            self._node(event)

    def _node(self, event: Any) -> None:
        if event.anchor is not None:
            self._refuse("an anchor")
        if event.tag is not None:
            self._refuse(f"the tag {one_line(event.tag, 60)}")
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"line {self.line}: it holds more than {self._max_nodes} values")
        if isinstance(event, yaml.ScalarEvent):
            self._put(self._scalar(event))
            return
        if len(self._open) == self._max_depth:
            raise ValueError(f"line {self.line}: it is more than {self._max_depth} levels deep")
        made: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
        self._put(made)
        self._open.append((made, []))

    def _put(self, value: Any) -> None:
        if not self._open:
            self.value = value
            return
        container, waiting = self._open[-1]
        if isinstance(container, list):
            container.append(value)
        elif waiting:
            container[waiting.pop()] = value
        elif not isinstance(value, str):
            raise ValueError(f"line {self.line}: a key is no text")
        elif value in container:
            raise ValueError(f"line {self.line}: the key '{one_line(value, 60)}' stands twice")
        else:
            waiting.append(value)

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            self._refuse("half a surrogate pair")
        if event.style:  # quoted, or a block
            return text
        if text in _WORDS:
            return _WORDS[text]
        try:
            if _INT.fullmatch(text):
                return int(_short(text))
            if _FLOAT.fullmatch(text):
                return _finite(_short(text))
        except ValueError as error:
            raise ValueError(f"line {self.line}: {error}") from error
        return float(text.replace(".", "")) if _SPECIAL.fullmatch(text) else text

    def _refuse(self, what: str) -> None:
        raise ValueError(f"line {self.line}: {what} has no place here")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key '{one_line(twice, 60)}' stands twice")
    return value


def _no_such_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _short(text: str) -> str:
    if len(text) > NUMBER:
        raise ValueError(f"a number has {len(text)} characters")
    return text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _code(character: Any) -> str:
    return f"U+{character:04X}" if isinstance(character, int) else f"U+{ord(character):04X}"
