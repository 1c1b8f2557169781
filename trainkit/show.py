"""Tables for people and JSON for scripts: the verbs `list-checkpoints` and `doctor`."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainkit import doctor as examine
from trainkit.checkpoint.find import Entry, list_checkpoints
from trainkit.launch import policy
from trainkit.units import human_bytes, human_time


def checkpoints(run: str | None, root: Path, *, as_json: bool) -> None:
    """The checkpoints of every run, or of one, newest last."""
    entries = list_checkpoints(root, policy, run)
    if as_json:
        print(json.dumps([entry.as_json() for entry in entries], indent=2))
        return
    if not entries:
        print(f"no checkpoints in {root}: `trainkit train` makes some")
        return
    table = Table("run", "step", "tiers", "epoch", "val loss", "size", "age", "verified", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(*_row(entry))
    Console().print(table)
    for name, mirror in {entry.run: entry.mirror for entry in entries if entry.mirror}.items():
        problem = f", [red]{mirror['problem']}[/red]" if mirror["problem"] else ""
        Console(soft_wrap=True).print(f"mirror of {name}: {mirror['url']}, step {mirror['uploaded_step']}{problem}")


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.run,
        str(entry.step),
        " ".join(entry.tiers),
        "-" if entry.epoch is None else f"{entry.epoch:.2f}",
        "-" if entry.val_loss is None else f"{entry.val_loss:.4f}",
        human_bytes(entry.bytes),
        "-" if entry.time is None else human_time(max(0.0, time.time() - entry.time)),
        "yes" if entry.verified else f"[red]no: {entry.problem}[/red]",
    )


def doctor(root: Path, *, as_json: bool) -> None:
    """What this machine has, what trainkit can use of it, and what to do about the rest."""
    rows = examine.report(root)
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=2))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    colours = {"ok": "green", "warn": "yellow", "bad": "red"}
    for row in rows:
        table.add_row(f"[{colours[row.status]}]{row.status}[/]", row.what, row.value, f"[dim]{row.advice}[/dim]")
    Console().print(table)
