"""Starting a run and going on with one: the verbs `train` and `resume`."""

from pathlib import Path

from rich.console import Console

from trainkit import build
from trainkit import run as runs
from trainkit.checkpoint import fetch, find
from trainkit.errors import DONE, STOPPED
from trainkit.progress import bytes_bar
from trainkit.run import Run
from trainkit.run import policy as policy
from trainkit.signals import Signals


def train(run: Run, root: Path, *, start: Path | None = None) -> int:
    """Start `run` in `root`, or go on with it (from the checkpoint `start` if given); the exit code says how it ended."""
    folder = root / run.name
    with (
        Signals(notice=run.guard.notice) as signals,
        bytes_bar() as report,
        build.trainer(run, folder, start=start, report=report, signals=signals) as trainer,
    ):
        fresh = trainer.learner.step < trainer.stop_at
        end = trainer.fit()
        first = trainer.learner.ranks.first
    if first:
        _say_what_next(run, trainer.learner.step, end, fresh)
    return DONE if end in ("done", "patience") else STOPPED


def resumed(which: str, overrides: list[str], root: Path, config_dir: Path | None) -> tuple[Run, Path, Path | None]:
    """The run that `which` names, from its folder alone, the folder of runs that it is in, and where it is to `start`.

    `latest`, a run's name or its folder mean its newest good checkpoint (None); anything else that very checkpoint. An
    address is fetched first.
    """
    if fetch.is_url(which):
        named = fetch.fetch(which, root, differs=runs.differ, adopt=adopt, note=print)
        which = str(named.parents[1]) if "step-" not in which.rsplit("/", 1)[-1] else str(named)
    else:
        named = find.resolve(which, root, policy)
    folder = named.parents[1]
    content: str | bytes = runs.content(folder)
    if folder.resolve().parent != root.resolve():
        content = adopt(runs.saved(content).yaml(), None)
    run = runs.saved(content, overrides, config_dir=config_dir)
    newest = which == "latest" or (root / which) == folder or Path(which) == folder
    return run, folder.parent, None if newest else named


def adopt(text: str, origin: str | None) -> str:
    """The `run.yaml` of a run that came here from `origin`, which may be anyone's: nothing is sent where nobody here said."""
    kept, mirror = runs.adopted(text, origin)
    if mirror is not None:
        print(
            f"the mirror {mirror} of its run.yaml is not where this run came from, and is left out: checkpoint.mirror= sets one"
        )
    return kept


def _say_what_next(run: Run, step: int, end: str, fresh: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if end not in ("done", "patience"):
        console.print(f"stopped by {end} at step {step} of {run.steps}; nothing is lost. Go on with:")
        console.print(f"  trainkit resume {run.name}", markup=False)
        return
    why = f" (no better for {run.evaluation.patience} evaluations)" if end == "patience" else ""
    console.print(f"{run.name} is at step {step} of {run.steps}{why}{'' if fresh else ' already'}. What to try next:")
    more = f"trainkit resume {run.name}" if step < run.steps and end == "done" else None
    steps = [
        more,
        f"trainkit generate {run.name} --prompt 'Call me '" if run.task.writes else None,
        f"trainkit embed {run.name} < LINES > vectors.npy" if run.task.takes == "pairs" else None,
        f"trainkit evaluate {run.name}",
        "trainkit list-checkpoints",
        "tensorboard --logdir runs",
        "trainkit train model=char-small data=text data.path=A_FOLDER_OF_TEXT",
    ]
    for line in filter(None, steps):
        console.print(f"  {line}", markup=False)
