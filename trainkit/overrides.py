"""What a person typed after a verb, checked word by word against the groups and the fields that exist.

Hydra's own grammar (https://hydra.cc/docs/advanced/override_grammar/basic) with three comforts: `memory=a+b` is a list
of strategies, a field that no YAML mentions needs no `+`, and a word that does not exist is answered with the nearest.
"""

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from trainkit.choices import ANY_OF_SEVERAL, CONF, MAY_BE_NULL, choices
from trainkit.errors import UserError, nearest
from trainkit.strict import MAX_YAML, parse_yaml, read_file

_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~|)(?P<key>[\w/@.:-]+)(?:=(?P<value>.*))?", re.DOTALL)

_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")  # how pydantic calls the parts of a number-or-word


class Overrides:
    """A person's overrides of a `Run`, each one checked."""

    def __init__(self, run: type, texts: list[str], config_dir: Path | None = None) -> None:
        self._run, self._choices, self._roots = run, choices(config_dir), [CONF, *filter(None, [config_dir])]
        self._given = [self._split(text) for text in texts]
        self._hydra = [self._checked(*given) for given in self._given]

    def hydra(self) -> list[str]:
        """The overrides in Hydra's grammar."""
        return self._hydra

    def groups(self) -> list[str]:
        """The groups of which a choice is given."""
        return [key for _, key, _ in self._given if key in self._choices]

    def values(self) -> list[str]:
        """The fields that are given a value, dotted."""
        return [key for sign, key, _ in self._given if key not in self._choices and sign != "~"]

    def _split(self, text: str) -> tuple[str, str, str]:
        match = _OVERRIDE.fullmatch(text)
        if not match or (match["value"] is None and match["sign"] != "~"):
            raise UserError(f"'{text}' is not an override: write key=value, such as optimizer.lr=3e-4 or model=gpt2")
        key = match["key"].replace("/", ".") if match["key"].replace("/", ".") in self._choices else match["key"]
        return match["sign"], key, match["value"] or ""

    def _checked(self, sign: str, key: str, value: str) -> str:
        if sign == "~":
            return f"~{key}={value}" if value else f"~{key}"
        if key in self._choices:
            return self._choice(key, value)
        if not _accepts(self._run, key.split(".")):
            words = {*_keys(self._run), *self._choices}
            close = nearest(key, words)
            shown = close if close.startswith("; did") else "; `trainkit config` shows every key"
            raise UserError(f"'{key}' is not a key of a run{shown}")
        return f"++{key}={value}"

    def _choice(self, group: str, value: str) -> str:
        inner = value.removeprefix("[").removesuffix("]")
        if "," in inner and inner == value:
            raise UserError(f"{group}={value} is a sweep, and one run takes one choice{_join_hint(group, value)}")
        several = group in ANY_OF_SEVERAL
        names = [n.strip() for n in re.split(r"[+,]", inner)] if several else [value]
        for name in names:
            if name not in self._choices[group] and not (name == "null" and group in MAY_BE_NULL):
                said = _called_otherwise(group, name) or nearest(name, self._choices[group])
                raise UserError(f"{group} has no choice '{name}'{said}")
        if several:
            self._refuse_clash(group, names)
        # in one order however they are typed: what is said of the same key twice is the same then
        in_hydra = group.replace(".", "/")
        if value == "null":
            return f"~{in_hydra}"
        return f"{in_hydra}=[{','.join(sorted(names))}]" if several else f"{in_hydra}={value}"

    def _refuse_clash(self, group: str, names: list[str]) -> None:
        """Raise UserError where two choices that are joined say different things of one key: the last would win."""
        said: dict[str, tuple[str, Any]] = {}
        for name in names:
            if name == "baseline":
                continue  # it is what the others change
            file = next(f for root in self._roots if (f := root / group / f"{name}.yaml").exists())
            try:
                tree = parse_yaml(read_file(file, MAX_YAML).decode())
            except (OSError, ValueError):
                continue  # a person's own file: Hydra, which reads more than values, says what it thinks of it
            for key, value in _leaves(tree):
                other, before = said.setdefault(key, (name, value))
                if value != before:
                    raise UserError(
                        f"{group}={'+'.join(names)}: {other} says {group}.{key}={before} and {name} says {value}: "
                        f"take one of the two"
                    )


def explain(run: type, error: Any) -> str:
    """One sentence of a person's words for one of pydantic's error details (`loc`, `type`, `msg`, `input`)."""
    path, owner, tag = _place(run, error["loc"])
    given = error.get("input")
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            parent, _, key = path.rpartition(".")
            of = f"{parent}={tag}" if tag else (parent or "a run")
            return f"{of} has no '{key}'{nearest(key, _names(owner))}"
        case "missing":
            return f"{path} is missing: give it as {path}=..."
        case "value_error":
            return str(error["ctx"]["error"])
        case "literal_error" | "union_tag_invalid":
            expected = re.findall(r"'([^']*)'", str(error["ctx"].get("expected") or error["ctx"].get("expected_tags")))
            value = error["ctx"].get("tag", given)
            return f"{path}={value} is not a choice{nearest(str(value), expected)}"
    return f"{path}={given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def typed_wrongly(tree: Any, typed: Any, path: str = "") -> str | None:
    """The first true/false that was given where a number belongs: pydantic would take it for 1 or 0."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            below = typed[key] if isinstance(typed, dict) else getattr(typed, key)
            if found := typed_wrongly(value, below, f"{path}.{key}" if path else key):
                return found
    elif isinstance(tree, bool) and not isinstance(typed, bool):
        return f"{path}={str(tree).lower()}: input should be a {type(typed).__name__}"
    return None


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif key != "defaults":  # Hydra's own word
            yield prefix + key, value


def _called_otherwise(group: str, name: str) -> str:
    """What to say to somebody who asks for another program's optimizer of few bits; nothing to others."""
    if group in ("memory", "optimizer") and "paged" in name:
        return ": bitsandbytes' paged states lie where CUDA moves them; memory=8bit+offload_optimizer keeps them on the host"
    if group == "optimizer" and (bits := re.search(r"([48])-?_?bit", name)):
        return f": bits are not the optimizer's but memory's: optimizer=adamw memory={bits[1]}bit"
    return ""


def _join_hint(group: str, value: str) -> str:
    joined = "+".join(value.split(","))
    return f": {group}={joined} uses them together" if group in ANY_OF_SEVERAL else ""


def _classes(hint: Any) -> list[type]:
    """The config classes that a type hint admits."""
    if get_origin(hint) is Annotated:
        return _classes(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [c for a in get_args(hint) for c in _classes(a)]
    return [hint] if is_dataclass(hint) and isinstance(hint, type) else []


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _dict_value(hint: Any) -> Any | None:
    """The value type of a `dict[str, ...]` hint, whose keys are a person's own words."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((get_args(o)[1] for o in options if get_origin(o) is dict), None)


def _accepts(cls: type, path: list[str]) -> bool:
    hint = _hints(cls).get(path[0])
    if hint is None or len(path) == 1:
        return hint is not None
    rest = path[1:]
    value = _dict_value(hint)
    if value is not None:
        hint, rest = value, rest[1:]
        if not rest:
            return True
    return any(_accepts(c, rest) for c in _classes(hint))


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(cls).items():
        yield prefix + name
        for below in _classes(hint):
            yield from _keys(below, f"{prefix}{name}.")


def _names(owner: Any) -> list[str]:
    return [f.name for f in fields(owner)] if is_dataclass(owner) else []


def _place(run: type, loc: tuple[Any, ...]) -> tuple[str, Any, str | None]:
    """The dotted path of an error, the class that it is in, and the `kind` that was chosen there."""
    path: list[str] = []
    candidates, tag = [run], None
    owner: Any = run
    for part in loc:
        tagged = next((c for c in candidates if _tag(c) == part), None)
        if tagged is not None and path:
            owner, candidates, tag = tagged, [tagged], str(part)
            continue
        if any(c.__name__ == part for c in candidates) or _MEMBER.fullmatch(str(part)):
            continue
        path.append(str(part))
        hint = next((_hints(c)[part] for c in candidates if part in _hints(c)), None)
        below = _classes(_dict_value(hint) or hint) if hint is not None else []
        if below:
            candidates, tag = below, None
            owner = below[0]
    return ".".join(path), owner, tag


def _tag(cls: type) -> str | None:
    hint = _hints(cls).get("kind")
    return get_args(hint)[0] if get_origin(hint) is Literal else None
