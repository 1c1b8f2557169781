"""The figures in the terminal: a table with lines where there is one, plain columns where not."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainkit.benchmark import words
from trainkit.units import human_bytes

COLOURS = {"ok": "green", "oom": "yellow", "failed": "red", "refused": "dim"}


def show(document: Mapping[str, Any], console: Console) -> None:
    """Every experiment: its figures, its memory by category, what went wrong, and what it says in a sentence."""
    if not console.is_terminal:
        console = Console(file=console.file, width=200)  # a line a cell, whoever reads it
    for title, cells in words.experiments(document):
        if title:
            console.print(f"\n[bold]{escape(title)}[/bold]")
        console.print(_figures(cells, console))
        if memory := _memory(cells, console):
            console.print(memory)
        if talked := _talk(cells, console):
            console.print(talked)
        if "against" in document:
            console.print(_against(cells, console))
        for cell in cells:
            if cell["error"]:
                _say(console, f"{cell['name']}: {cell['error']}", "dim")
        if said := words.headline(cells):
            _say(console, said)
    if "against" in document:
        _say(console, words.against_what(document))
    console.print()
    _say(console, words.measured(document), "dim")


def _say(console: Console, text: str, style: str = "") -> None:
    """A sentence: wrapped at words where a person reads it, in one line where it is a script."""
    console.print(escape(text), style=style, soft_wrap=not console.is_terminal, highlight=False)


def _figures(cells: Sequence[Mapping[str, Any]], console: Console) -> Table:
    table = _table(console)
    table.add_column("", overflow="fold")
    for column in words.COLUMNS:
        table.add_column(column, justify="left" if column == "status" else "right")
    for cell in cells:
        *figures, status = words.row(cell)
        colour = COLOURS[status]
        table.add_row(escape(cell["name"]), *figures, f"[{colour}]{status}[/{colour}]")
    return table


def _memory(cells: Sequence[Mapping[str, Any]], console: Console) -> Table | None:
    """The peak by category, where it was measured."""
    names = words.categories(cells)
    if not names:
        return None
    table = _table(console)
    table.add_column("memory at the peak")
    for name in names:
        table.add_column(name, justify="right")
    for cell in cells:
        if sizes := cell["memory_by_category"]:
            table.add_row(escape(cell["name"]), *(human_bytes(sizes.get(name, 0)) for name in names))
    return table


def _talk(cells: Sequence[Mapping[str, Any]], console: Console) -> Table | None:
    """What ranks say to each other, where there are several."""
    figures = {cell["name"]: found for cell in cells if (found := words.talk(cell))}
    if not figures:
        return None
    table = _table(console)
    for name in ("between ranks, a step", *words.TALK):
        table.add_column(name, justify="right" if name in words.TALK else "left")
    for name, found in figures.items():
        table.add_row(escape(name), *found)
    return table


def _against(cells: Sequence[Mapping[str, Any]], console: Console) -> Table:
    """Now over then."""
    table = _table(console)
    table.add_column("now over then")
    for name in words.AGAINST:
        table.add_column(name, justify="right" if name else "left")
    for cell in cells:
        if (figures := words.against(cell)) is None:
            table.add_row(escape(cell["name"]), *[words.NOTHING] * (len(words.AGAINST) - 1), "new")
        else:
            worse = cell["against"]["worse"]
            *ratios, verdict = figures
            table.add_row(escape(cell["name"]), *ratios, f"[red]{verdict}[/red]" if worse else verdict)
    return table


def _table(console: Console) -> Table:
    return Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="bold")
