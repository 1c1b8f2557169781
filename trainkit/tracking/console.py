"""The terminal: a header, a progress bar with the numbers that matter, samples. Without a terminal, plain lines."""

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console as Terminal
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from trainkit.config import config
from trainkit.units import human_count, human_time

BAR = 16  # characters of progress bar


@config
class Console:
    """To standard output."""

    def build(self, folder: Path) -> "RichTracker | PlainTracker":
        """The tracker that suits where the output goes."""
        terminal = Terminal(highlight=False)
        return RichTracker(terminal) if terminal.is_terminal else PlainTracker(terminal)


def facts(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics as people read them, the most telling first."""
    shown = {"loss": f"{metrics['loss']:.4f}"} if "loss" in metrics else {}
    if "tokens_per_s" in metrics:
        shown["tok/s"] = human_count(metrics["tokens_per_s"])
    if "eta_s" in metrics:
        shown["eta"] = human_time(metrics["eta_s"])
    if "mfu" in metrics:
        shown["mfu"] = f"{metrics['mfu']:.0%}"
    if "memory_gb" in metrics:
        shown["mem"] = f"{metrics['memory_gb']:.2f} GB"
    if "lr" in metrics:
        shown["lr"] = f"{metrics['lr']:.2e}"
    return shown


def evaluation(metrics: Mapping[str, float]) -> str | None:
    """The validation metrics of a step in one line, if it has any."""
    found = {k.removeprefix("val_").replace("_", " "): v for k, v in metrics.items() if k.startswith("val_")}
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items()) or None


class RichTracker:
    """A panel, then a bar that stays at the bottom while lines go by above it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in header.items():
            table.add_row(name, escape(value))
        self._terminal.print(Panel(table, title="trainkit", title_align="left", border_style="cyan", box=box.ROUNDED))
        self._progress = Progress(
            TextColumn("{task.completed:>6.0f}[dim]/{task.total:.0f}[/dim]"),
            BarColumn(bar_width=BAR, complete_style="cyan", finished_style="green"),
            _Facts(self._terminal),
            console=self._terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=steps, completed=step, facts={})
        self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=step, facts=facts(metrics))
        if found := evaluation(metrics):
            self._progress.console.print(f"[cyan]step {step}[/cyan]  validation {found}")

    def go_back(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def text(self, step: int, tag: str, text: str) -> None:
        body = Text(text.strip("\n"), style="italic dim")
        self._progress.console.print(Panel(body, title=f"{tag} at step {step}", title_align="left", border_style="dim"))

    def note(self, message: str) -> None:
        style = "yellow" if message.startswith("warning") else "dim"
        self._progress.console.print(f"[{style}]{escape(message)}[/{style}]")

    def close(self, status: str) -> None:
        self._progress.stop()


class _Facts(ProgressColumn):
    """As many of the numbers as the terminal is wide enough for."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._terminal = terminal

    def render(self, task: Task) -> Text:
        room = self._terminal.width - BAR - 18
        text = Text()
        for name, value in task.fields["facts"].items():
            if text.cell_len + len(name) + len(value) + 3 > room:
                break
            text.append(f"{name} ", style="dim").append(f"{value}  ")
        return text


class PlainTracker:
    """One line a log, for files and pipes."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        self._steps = steps
        for name, value in header.items():
            self._say(f"{name}: {value}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {value}" for name, value in facts(metrics).items())
        self._say(f"step {step}/{self._steps}  {shown}")
        if found := evaluation(metrics):
            self._say(f"step {step}/{self._steps}  validation {found}")

    def go_back(self, step: int) -> None:
        """A note says it."""

    def text(self, step: int, tag: str, text: str) -> None:
        self._say(f"--- {tag} at step {step}\n{text.strip(chr(10))}\n---")

    def note(self, message: str) -> None:
        self._say(message)

    def close(self, status: str) -> None:
        """Every line is out already."""

    def _say(self, line: str) -> None:
        print(line, file=self._terminal.file, flush=True)
