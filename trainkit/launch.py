"""Starting a run and going on with one: the verbs `train` and `resume`."""

from pathlib import Path

from rich.console import Console

from trainkit import build, run as runs
from trainkit.checkpoint.find import resolve
from trainkit.errors import DONE, STOPPED, DamagedError, UserError
from trainkit.progress import bytes_bar
from trainkit.run import Run


def train(run: Run, root: Path) -> int:
    """Start `run` in `root`, or go on with it; the exit code says how it ended."""
    folder = root / run.name
    with bytes_bar() as report, build.trainer(run, folder, report) as trainer:
        if trainer.learner.step >= trainer.stop_at:
            trainer.trackers.close("done")
            print(f"run {run.name} is at step {trainer.learner.step} already: nothing to do")
            return DONE
        try:
            end = trainer.fit()
        except BaseException as error:
            trainer.trackers.close(type(error).__name__)
            raise
        trainer.trackers.close(end)
    _say_what_next(run, trainer, end)
    return DONE if end in ("done", "patience") else STOPPED


def resume(which: str, overrides: list[str], root: Path, config_dir: Path | None) -> int:
    """Go on with the run that `which` names, from its folder alone."""
    checkpoint = resolve(which, root)
    folder = checkpoint.parents[1]
    run = runs.saved((folder / runs.FILE).read_text(), overrides, config_dir=config_dir)
    return train(run, folder.parent)


def _say_what_next(run: Run, trainer: build.Trainer, end: str) -> None:
    console = Console(highlight=False)
    at = f"step {trainer.learner.step} of {run.steps}"
    if end == "done" or end == "patience":
        why = "" if end == "done" else f" (no better for {run.evaluation.patience} evaluations)"
        console.print(f"\n[bold]{run.name}[/bold] is trained to {at}{why}. Next:")
        console.print(f"  trainkit generate {run.name} --prompt 'Call me '", markup=False)
        console.print(f"  trainkit evaluate {run.name}", markup=False)
        console.print("  trainkit list-checkpoints", markup=False)
        console.print("  tensorboard --logdir runs", markup=False)
        console.print("  trainkit train model=char-small steps=2000    # or data=text data.path=FOLDER", markup=False)
    else:
        console.print(f"\nstopped by {end} at {at}; nothing is lost. Go on with:\n  trainkit resume {run.name}")
