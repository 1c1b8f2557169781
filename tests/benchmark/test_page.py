"""The page, the picture, the table and the CSV: complete, harmless, and in need of nothing else."""

import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.benchmark.made_up import HOSTILE, MIB, found, made_up, usual
from trainkit.benchmark import against, labels, outputs, picture, table
from trainkit.benchmark.outputs import Outputs
from trainkit.benchmark.page import page
from trainkit.benchmark.scatter import best, scatter, ticks
from trainkit.errors import UserError

VOID = {"meta", "wbr", "br"}


class Reader(HTMLParser):
    """Tags that close as they open, every attribute, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_from_anywhere() -> None:
    made = usual()
    against.compare(made, {"path": "then.json", "environment": {}, "cells": made["cells"]})
    text = page(made)
    read = Reader(text)
    assert read.open == []
    assert not set(read.tags) & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use"}
    names = {name for _, name, _ in read.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "data", "action", "background", "http-equiv"}
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"url\(|@import|@font-face|https?:", text)


def test_the_page_says_everything() -> None:
    text = Reader(page(usual())).text
    for word in (
        "an experiment",
        "1,909 ±5%",
        "0.79×",
        "40.0 MiB",
        "oom",
        "refused",
        "cannot be",
        HOSTILE,
        "an abacus",
    ):
        assert word in text
    assert "trainkit benchmark" in text
    assert "Throughput against memory" in text
    for svg in re.findall(r"<svg.*?</svg>", page(usual()), re.DOTALL):
        points = ElementTree.fromstring(svg).findall("circle")
        assert len(points) == 3
    assert "Throughput against memory" not in page(made_up([{"status": "failed", "error": "a shame"}]))


def test_bars_are_as_long_as_the_memory_they_stand_for() -> None:
    widths = [float(w) for w in re.findall(r'class="k\d" style="width:([\d.]+)%"', page(usual()))]
    assert widths[:4] == pytest.approx([10, 90, 10, 30])


def test_points_lie_where_their_figures_are() -> None:
    made = made_up([found(4.0, 60 * MIB)], [found(8.0, 30 * MIB)])["cells"]  # 1000 and 500 tokens a second
    svg = ElementTree.fromstring(scatter(made, 500, 400))
    (x1, y1), (x2, y2) = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in svg.findall("circle")]
    ticks = {t.text: (float(t.get("x", 0)), float(t.get("y", 0)) - 4) for t in svg.findall("text[@class='tick']")}
    assert all(0 <= x <= 500 and 0 <= y <= 400 for x, y in ticks.values())
    assert (y1, y2) == pytest.approx((ticks["1,000"][1], ticks["500"][1]), abs=0.1)
    assert x1 == pytest.approx(ticks["60"][0], abs=0.1)
    assert x2 == pytest.approx((ticks["20"][0] + ticks["40"][0]) / 2, abs=0.1)
    assert "first" in str(svg.findall("circle")[0].get("class"))
    assert scatter([], 500, 400) == ""


def test_the_line_joins_what_nothing_beats_in_both() -> None:
    places = [(10.0, 50.0), (5.0, 60.0), (20.0, 40.0), (15.0, 55.0), (10.0, 58.0)]  # y counts from the top
    assert best(places) == [1, 0, 2]


@given(st.floats(min_value=1e-6, max_value=1e12), st.integers(min_value=2, max_value=8))
def test_axes_are_round_and_just_long_enough(largest: float, most: int) -> None:
    found = ticks(largest, most)
    assert found[0] == 0
    assert found[-2] < largest * 1.06 <= found[-1] * (1 + 1e-9)
    assert len(found) <= most + 2


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(20, 280)), min_size=1, max_size=5))
def test_names_lie_on_no_other_name(points: list[tuple[float, float]]) -> None:
    placed = labels.place(points, [90.0] * len(points), 520, 300)
    boxes = [label.box for label in placed]
    for i, box in enumerate(boxes):
        assert box[0] >= 0
        assert box[1] <= 520
        assert not any(labels._overlap(box, other) for other in boxes[:i])


def test_the_table_is_plain_columns_in_a_pipe() -> None:
    text = io.StringIO()
    table.show(usual(), Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    (line,) = [line for line in lines if line.startswith("checkpoint") and "ok" in line]
    assert re.split(r"\s{2,}", line.strip()) == [
        *(
            "checkpoint",
            "1,510 ±2%",
            "0.79×",
            "662",
            "75%",
            "40.0 MiB",
            "−60.0\N{NO-BREAK SPACE}%",
            "5.00000",
            "0",
            "ok",
        ),
    ]
    assert "never: cannot be" in lines
    assert not set(text.getvalue()) & set("─│┃\x1b")


def test_the_table_marks_what_is_worse() -> None:
    made, then = usual(), usual()
    then["cells"][1]["peak_memory_bytes"] //= 2
    then["cells"].pop(4)
    against.compare(made, {"path": "then.json", "environment": {}, "cells": then["cells"]})
    text = io.StringIO()
    table.show(made, Console(file=text, force_terminal=True, width=150, no_color=True, highlight=False))
    assert re.search(r"checkpoint +1\.00× +2\.00× +0 +more memory", text.getvalue())
    assert re.search(r"baseline +1\.00× +1\.00× +0 +no worse", text.getvalue())
    assert re.search(r"– +– +– +new", text.getvalue())
    assert "more memory" in Reader(page(made)).text


def test_csv_has_a_line_a_cell() -> None:
    rows = list(csv.DictReader(io.StringIO(outputs.table(usual()))))
    assert [row["status"] for row in rows] == ["ok", "ok", "oom", "refused", "ok"]
    assert rows[1]["overrides"] == "memory=checkpoint"
    assert float(rows[1]["peak_memory_bytes"]) == 40 * MIB
    assert rows[1]["memory_activations"] == str(30 * MIB)
    assert rows[2]["tokens_per_s"] == ""


def test_files_of_every_kind(tmp_path: Path) -> None:
    asked = Outputs.of(tmp_path / "new", json=tmp_path / "mine.json", csv=None, png=None, html=None)
    asked.check()
    files = {path.name for path in asked.write(usual())}
    assert files == {"mine.json", "benchmark.csv", "benchmark.png", "benchmark.html"}
    assert (tmp_path / "new" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_where_a_file_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "no" / "x.json"):
        with pytest.raises(UserError, match=r"--json .* cannot be written"):
            Outputs(json=path).check()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file is no folder"):
        Outputs.of(tmp_path / "file", json=None, csv=None, png=None, html=None)
    monkeypatch.setattr(picture, "can_draw", lambda: False)
    with pytest.raises(UserError, match=r"--png needs matplotlib: pip install 'trainkit\[plot\]'"):
        Outputs(png=tmp_path / "x.png").check()
    without = Outputs.of(tmp_path / "out", json=None, csv=None, png=None, html=None)
    assert without.png is None
    without.check()
