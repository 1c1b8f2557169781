"""The figures as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainkit.benchmark import words
from trainkit.benchmark.scatter import scatter
from trainkit.units import human_bytes

STYLE = Path(__file__).with_name("page.css")
SWATCHES = 6


def page(document: Mapping[str, Any]) -> str:
    """The whole page: what each experiment says, its pictures, its table, and where the figures come from."""
    body = [part for title, cells in words.experiments(document) for part in _experiment(title, cells, document)]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>trainkit benchmark</title><style>\n{STYLE.read_text()}</style></head><body><main>",
        "<h1>trainkit benchmark</h1>",
        f'<p class="soft">{escape(words.measured(document))}</p>',
        *body,
        "<h2>Where</h2>",
        f'<div class="card">{_facts(document)}</div>',
        "<h2>The command</h2>",
        f"<pre><code>{escape(document['command'])}</code></pre>",
        "</main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _experiment(title: str, cells: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> Iterator[str]:
    """A section of the page."""
    if title:
        yield f"<h2>{escape(title)}</h2>"
    if said := words.headline(cells):
        yield f'<p class="lead">{escape(said)}</p>'
    yield '<div class="cards">'
    if wide := scatter(cells, 520, 380):
        yield '<section class="card"><h3>Throughput against memory</h3>'
        yield f'<div class="wide">{wide}</div><div class="narrow">{scatter(cells, 340, 330)}</div>'
        yield '<p class="soft" style="margin:.5rem 0 0;font-size:.85rem">Up and to the left is better. A dashed line joins '
        yield "what nothing else beats in both; the hollow cell is what the others are compared with.</p></section>"
    if any(c["memory_by_category"] for c in cells):
        yield f'<section class="card"><h3>Memory at the peak, by category</h3>{_bars(cells)}</section>'
    yield "</div>"
    yield f'<div class="card scroll">{_table(cells)}</div>'
    if "against" in document:
        yield f'<p class="soft">{escape(words.against_what(document))}</p>'
        yield f'<div class="card scroll">{_against(cells)}</div>'
    if problems := [c for c in cells if c["error"]]:
        yield "<ul>"
        for cell in problems:
            yield f"<li><strong>{escape(cell['name'])}</strong> <span class=soft>{escape(cell['error'])}</span></li>"
        yield "</ul>"


def _bars(cells: Sequence[Mapping[str, Any]]) -> str:
    names = words.categories(cells)
    largest = max(sum((c["memory_by_category"] or {}).values()) for c in cells)
    rows = []
    for cell in cells:
        sizes = cell["memory_by_category"]
        if sizes is None:
            how, total = "none", cell["status"]
        else:
            change = "" if cell is cells[0] else f"&ensp;{words.percent(cell['memory_change'])}"
            how, total = "", human_bytes(cell["peak_memory_bytes"]) + change
        pieces = "".join(
            f'<i class="k{names.index(n) % SWATCHES}" style="width:{size / largest:.3%}" title="{n} {human_bytes(size)}"></i>'
            for n, size in sorted(
                (sizes or {}).items(), key=lambda item: names.index(item[0]) if item[0] in names else 99
            )
            if size
        )
        head = f'<div class="bar-head"><span>{escape(cell["name"])}</span><span>{total}</span></div>'
        rows.append(f'<div>{head}<div class="bar {how}">{pieces}</div></div>')
    legend = "".join(f'<span><i class="k{i % SWATCHES}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="bars">{"".join(rows)}</div><div class="legend">{legend}</div>'


def _table(cells: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th{' class=status' if c == 'status' else ''}>{c}</th>" for c in words.COLUMNS)
    rows = []
    for cell in cells:
        *figures, status = words.row(cell)
        numbers = "".join(f"<td>{escape(figure)}</td>" for figure in figures)
        rows.append(f'<tr><td>{_breakable(cell["name"])}</td>{numbers}<td class="status {status}">{status}</td></tr>')
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _against(cells: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in words.AGAINST)
    rows = []
    for cell in cells:
        figures = words.against(cell) or (*[words.NOTHING] * (len(words.AGAINST) - 1), "new")
        worse = "worse" if (cell.get("against") or {}).get("worse") else "soft"
        numbers = "".join(f"<td>{escape(figure)}</td>" for figure in figures[:-1])
        rows.append(
            f'<tr><td>{_breakable(cell["name"])}</td>{numbers}<td class="{worse}">{escape(figures[-1])}</td></tr>'
        )
    return f"<table><thead><tr><th>now over then</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _facts(document: Mapping[str, Any]) -> str:
    facts = {**document["environment"]}
    facts["memory"] = human_bytes(facts.pop("memory_bytes"))
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
    return f"<dl>{rows}</dl>"


def _breakable(name: str) -> str:
    """A name that a narrow page may break where strategies join."""
    return escape(name).replace("+", "+<wbr>")
