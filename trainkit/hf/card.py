"""The README.md of a folder that leaves the house: what the model is, what it learned from and how, how well, how to cite."""

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = 12  # of the table of losses


def text(
    *,
    name: str,
    task: str,
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    run: str,
    base: str | None,
    version: str,
    picture: bool,
    use: str,
    tags: Sequence[str] = (),
    library: str = "transformers",
) -> str:
    """The card in Markdown.

    Args:
        name: what the model is called.
        task: the hub's word for what it does, such as text-generation.
        facts: what is said of it first, by name.
        metrics: the logged steps, of which a few are shown.
        run: the `run.yaml` whole.
        base: the model that it began with.
        picture: whether a loss.png lies beside it.
        use: lines of Python that load it.
    """
    head = [f"library_name: {library}", f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in ("trainkit", *tags))]
    head += [f"base_model: {base}"] if base and base.count("/") == 1 and not base.startswith((".", "/", "~")) else []
    parts = ["---", *head, "---", f"# {name}", ""]
    parts += [f"- {key}: {value}" for key, value in facts.items()]
    parts += ["", "## Use", "", "```python", use, "```", ""]
    if metrics:
        parts += ["## Losses", "", *(["![loss](loss.png)", ""] if picture else []), *_table(metrics), ""]
    parts += [
        "## How it was trained",
        "",
        f"By `trainkit {version}`, with this `run.yaml`:",
        "",
        "```yaml",
        run.rstrip(),
        "```",
    ]
    key = "".join(c if c.isalnum() else "_" for c in name.lower())
    parts += ["", "## Citation", "", "```bibtex", f"@misc{{{key},", f"  title = {{{name}}},"]
    parts += [f"  howpublished = {{Trained with trainkit {version}}},", "}", "```", ""]
    return "\n".join(parts)


def _table(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A dozen of the steps, the first and the last among them, and all columns that are losses."""
    columns = [key for key in ("loss", "val_loss") if any(row.get(key) is not None for row in metrics)]
    columns += sorted({key for row in metrics for key in row if key.startswith("val_")} - {*columns, "val_loss"})
    last = len(metrics) - 1
    chosen = sorted({round(i * last / min(ROWS - 1, max(last, 1))) for i in range(min(ROWS, last + 1))})
    evaluated = [i for i, row in enumerate(metrics) if row.get("val_loss") is not None]
    chosen = sorted({*chosen, *evaluated[-1:]})
    lines = [f"| step | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i in chosen:
        values = ["" if (v := metrics[i].get(c)) is None else f"{v:.4f}" for c in columns]
        lines.append(f"| {metrics[i]['step']} | {' | '.join(values)} |")
    return lines
