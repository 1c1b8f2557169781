"""A progress bar for long work before a run: bytes done of bytes in all, on a terminal only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Report = Callable[[int, int, str], None]


@contextmanager
def bytes_bar() -> Iterator[Report]:
    """A `report(done, total, what)` that draws on stderr from the first report until all is done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}

    def report(done: int, total: int, what: str) -> None:
        if not progress.console.is_terminal:
            return
        if what not in tasks:
            progress.start()
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)
        if progress.finished:
            progress.stop()

    try:
        yield report
    finally:
        if tasks:
            progress.stop()
