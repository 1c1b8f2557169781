"""Where the figures go beside the terminal: JSON, CSV, PNG and HTML."""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit import atomic
from trainkit.benchmark import picture, words
from trainkit.benchmark.page import page
from trainkit.errors import UserError

_NOT_IN_CSV = ("overrides", "memory_by_category", "memory_by_phase", "losses", "rounds", "log", "against")


@dataclass(frozen=True)
class Outputs:
    """The files that were asked for."""

    json: Path | None = None
    csv: Path | None = None
    png: Path | None = None
    html: Path | None = None

    @classmethod
    def of(cls, folder: Path | None, **files: Path | None) -> "Outputs":
        """These files, and in `folder` those of every kind that are not given: the picture where it can be drawn.

        Raises:
            UserError: the folder cannot be made.
        """
        if folder is not None:
            kinds = [kind for kind in files if kind != "png" or picture.can_draw()]
            files |= {kind: files[kind] or folder / f"benchmark.{kind}" for kind in kinds}
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out {folder} is no folder and cannot be made one: {error.strerror}") from error
        return cls(**files)

    def check(self) -> None:
        """Raise UserError where a file cannot be written, before anything is measured."""
        for kind, path in vars(self).items():
            if path is None:
                continue
            if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
                raise UserError(f"--{kind} {path} cannot be written: name a file in a folder that is there")
        if self.png is not None:
            picture.check()

    def write(self, document: Mapping[str, Any]) -> list[Path]:
        """Write them, and say which there are."""
        if self.json:
            atomic.write(self.json, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        if self.csv:
            atomic.write(self.csv, table(document).encode())
        if self.html:
            atomic.write(self.html, page(document).encode())
        if self.png:
            picture.draw(document, self.png)
        return [path for path in vars(self).values() if path is not None]


def table(document: Mapping[str, Any]) -> str:
    """The cells as CSV, a line each, with a column for every category of memory."""
    cells = document["cells"]
    categories = words.categories(cells)
    columns = [key for key in cells[0] if key not in _NOT_IN_CSV]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["overrides", *columns, *(f"memory_{name}" for name in categories)])
    for cell in cells:
        sizes = cell["memory_by_category"] or {}
        writer.writerow([" ".join(cell["overrides"]), *(cell[c] for c in columns), *(sizes.get(n) for n in categories)])
    return text.getvalue()
