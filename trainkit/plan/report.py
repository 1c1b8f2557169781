"""A plan for a person, and as JSON for a script."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainkit import atomic
from trainkit.plan.cards import WIRE
from trainkit.plan.planned import Plan, Talk
from trainkit.plan.search import Found
from trainkit.plan.world import NODE
from trainkit.units import human_bytes, human_count, human_time

SHOWN = 16
SAID_BYTES = 1 << 10  # what ranks send of single numbers is not worth a line


def verdict(plan: Plan) -> str:
    """Whether it fits, in one line."""
    card = plan.setting.card
    word = "fits" if plan.fits else "does not fit"
    each = " each" if plan.setting.ranks > 1 else ""
    return f"{word}: needs {human_bytes(plan.needed)} of {human_bytes(card.bytes)}{each} ({_cards(plan)})"


def show(plan: Plan, memory: str, largest: int | None) -> None:
    """The plan of a run."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[{'green' if plan.fits else 'red'}]{verdict(plan)}[/]")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(plan, memory, largest):
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)
    console.print(f"[dim]{assumed(plan)}[/]")


def show_found(found: Sequence[Found], cut_short: bool) -> None:
    """What would fit, or what comes nearest."""
    console = Console(highlight=False, soft_wrap=True)
    fit = [f for f in found if f.plan.fits]
    nothing = "nothing that fits was found in time" if cut_short else "nothing fits"
    near = "; the nearest:" if found else ""
    console.print("what fits, exact ways first, the fastest of them first:" if fit else nothing + near)
    shown = list(fit or found)[:SHOWN]
    if fit and (least := min(fit, key=lambda f: f.plan.host_bytes)) not in shown:
        shown.append(least)  # a machine's own memory may be what is short
    for f in shown:
        p = f.plan
        speed = f"{human_count(p.tokens_per_s)} tokens/s" if p.fits else "too large"
        mesh = f"  {p.sizes}" if p.setting.ranks > 1 else ""
        host = f"  {human_bytes(p.host_bytes):>10} of the host" if p.setting.card.cuda else ""
        console.print(f"  {human_bytes(p.needed):>10}{host}  {speed:>16}  {f.grade}{mesh}", markup=False)
        console.print(f"    {command(f)}", markup=False)
    if cut_short:
        console.print("the search was cut short by its time limit: --search-s makes it longer")


def command(found: Found) -> str:
    """The line to type."""
    words = " ".join(f"'{w}'" if set(w) & set(' ~$*()[]{}|&;<>"') else w for w in found.overrides)
    ranks = found.plan.setting.ranks
    if ranks == 1:
        return f"trainkit train {words}".rstrip()
    nodes = f"--nnodes={-(-ranks // NODE)} " if ranks > NODE else ""
    return f"torchrun {nodes}--nproc_per_node={min(ranks, NODE)} -m trainkit train {words}".rstrip()


def assumed(plan: Plan) -> str:
    """What the figures rest on."""
    setting, blocks = plan.setting, ", ".join(map(str, plan.depths))
    rows = "rows of several documents" if setting.documents else "rows of one document"
    traced = f"traced on {blocks} blocks" + (" and extrapolated to all" if len(plan.depths) > 1 else "")
    share = f"matrix products at {setting.share:.0%} of the peak"
    compiled = "not compiled" if plan.compile == "off" else f"compile={plan.compile} planned as eager"
    unseen = "" if plan.evaluated else "; a pipeline's evaluations and resumes not traced"
    wires = f"; {NODE} GPUs a machine, wires at {WIRE:.0%} of their data sheets" if setting.ranks > 1 else ""
    if not setting.card.cuda:
        return f"{traced}{unseen}; {rows}; {compiled}; {share}, which was measured here"
    return f"{traced}{unseen}; {rows}; {compiled}; {share}{wires}; figures for a GPU are not yet measured on one"


def cell(plan: Plan, overrides: Sequence[str], memory: str) -> dict[str, Any]:
    """A plan with the names of a benchmark's cell, each prediction marked as one."""
    return {
        "overrides": list(overrides),
        "memory": memory,
        "gpu": plan.setting.card.name,
        "gpus": plan.setting.ranks,
        "microbatch": plan.microbatch,
        "compile": plan.compile,
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "predicted_tokens_per_s": plan.tokens_per_s,
        "predicted_ms_per_step": plan.step_s * 1000,
        "predicted_peak_memory_bytes": max(plan.peaks.values()),
        "predicted_peaks": plan.peaks,
        "predicted_memory_by_category": plan.by_category,
        "predicted_device_bytes": plan.needed,
        "predicted_host_bytes": plan.host_bytes,
        "predicted_sent_bytes": plan.sent_bytes,
        "mesh": plan.sizes.by_axis(),
        "predicted_talk": [asdict(talk) for talk in plan.talk],
        "predicted_bubble": plan.bubble,
        "predicted_moved_bytes": plan.moved_bytes,
        "predicted_checkpoint_bytes": plan.checkpoint_bytes,
        "predicted_hours": plan.hours,
        "predicted_cost": plan.cost,
        "predicted_status": "ok" if plan.fits else "oom",
        "traced_depths": list(plan.depths),
    }


def write(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    """The JSON file of a plan and of what a search found."""
    atomic.write(path, (json.dumps({"cells": list(cells)}, indent=2) + "\n").encode())


def said(talk: Talk) -> str:
    """What a rank sends along some axes, in words."""
    how = "waited for" if talk.waited_for else "beside the rest"
    return f"{talk.axes}: {human_bytes(talk.sent)} a step by {talk.collective}, {talk.seconds * 1000:.3g} ms {how}"


def _cards(plan: Plan) -> str:
    return f"{plan.setting.ranks} × {plan.setting.card.name}" if plan.setting.ranks > 1 else plan.setting.card.name


def _rows(plan: Plan, memory: str, largest: int | None) -> list[tuple[str, str]]:
    peaks = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.peaks.items() if size)
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in plan.by_category.items())
    rows = [
        ("model", f"{human_count(plan.parameters)} parameters, {human_count(plan.flops_per_token)} FLOPs a token"),
        ("memory", f"{memory}, microbatch {plan.microbatch}"),
        ("peaks", peaks),
        ("training", parts),
        ("host", f"{human_bytes(plan.host_bytes)}, a checkpoint's copy included"),
        ("speed", f"{plan.step_s * 1000:.0f} ms a step, {human_count(plan.tokens_per_s)} tokens/s"),
        ("to the end", f"{human_time(plan.hours * 3600)} for {plan.steps} steps" + _priced(plan)),
        ("microbatch", f"{largest} rows are the most that fit" if largest else "not even one row fits"),
    ]
    if plan.setting.ranks > 1:
        rows.insert(1, ("mesh", str(plan.sizes)))
        rows += [("between ranks", said(talk)) for talk in plan.talk if talk.sent >= SAID_BYTES]
    if plan.bubble:
        rows.append(("pipeline", f"a rank stands still for {plan.bubble:.0%} of a step"))
    if plan.moved_bytes:
        rows.append(("to the host", f"{human_bytes(plan.moved_bytes)} a step, there and back"))
    return [row for row in rows if row[0] != "host" or plan.setting.card.cuda]


def _priced(plan: Plan) -> str:
    return "" if plan.cost is None else f", ${plan.cost:,.2f} at ${plan.setting.price} an hour and GPU"
