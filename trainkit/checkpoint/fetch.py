"""A run that lies on a remote, brought here so that it goes on as any run does: `trainkit resume s3://bucket/RUN`."""

import re
from collections.abc import Callable
from pathlib import Path

from trainkit import atomic
from trainkit.checkpoint import store
from trainkit.checkpoint.lock import NAME as LOCK
from trainkit.checkpoint.lock import RunLock
from trainkit.checkpoint.mirror import Differs
from trainkit.checkpoint.remote import CONFIG, Remote
from trainkit.errors import DamagedError, UserError, nearest

_URL = re.compile(r"[a-z][a-z0-9+.-]+://.+")
_STEP = re.compile(r"(.+?)/(?:checkpoints/)?step-([0-9]{1,10})")


def is_url(text: str) -> bool:
    """Whether a person means a remote, and no path or name."""
    return _URL.fullmatch(text) is not None


def fetch(
    url: str, root: Path, *, differs: Differs, adopt: Callable[[str, str], str], note: Callable[[str], None]
) -> Path:
    """Make the run at `url` (URL/RUN, or URL/RUN/checkpoints/step-N) one in `root`, with its newest good checkpoint or
    that of the step, verified and durable; the folder of that checkpoint. `differs` tells runs of one name apart;
    `adopt` makes of a run's config, and the URL that it came from, the one that is kept here.

    Raises:
        UserError: there is none, or the run in `root` is newer, another one or in use.
        DamagedError: no checkpoint there is good.
        RemoteError: the remote fails.
    """
    match = _STEP.fullmatch(url.rstrip("/"))
    where, step = (match[1], int(match[2])) if match else (url.rstrip("/"), None)
    base, _, run = where.rpartition("/")
    remote, folder = Remote(base), root / run
    whole = list(remote.checkpoints(run))
    if not whole:
        raise UserError(f"{remote.url} has no whole checkpoint of a run '{run}'{nearest(run, remote.runs())}")
    newest = whole[-1] if step is None else step
    if newest not in whole:
        raise UserError(
            f"{remote.url}/{run} has no whole checkpoint of step {newest}: it has {', '.join(map(str, whole))}"
        )
    config = remote.config(run, step)
    if config is None:
        raise DamagedError(f"no {CONFIG} of a checkpoint in {where} is good")
    with RunLock(folder):
        _refuse(folder, newest, config, differs)
        if not (folder / CONFIG).exists():
            atomic.write(folder / CONFIG, adopt(config, base).encode())
            atomic.sync_folder(root)
        (folder / store.FOLDER).mkdir(exist_ok=True)
        atomic.sync_folder(folder)
        return remote.download(run, step, folder / store.FOLDER, note)


def _refuse(folder: Path, step: int, config: str, differs: Differs) -> None:
    """Raise UserError where `folder` holds something that the checkpoint of `step` does not belong to."""
    mine = folder / CONFIG
    if not mine.exists():
        if other := sorted(p.name for p in folder.iterdir() if p.name != LOCK):
            raise UserError(f"{folder} is there and is no run (it holds {other[0]}): choose another --runs")
        return
    if differences := differs(mine.read_text(), config):
        raise UserError(f"{folder} is another run ({differences[0]}): choose another --runs")
    newer = [s for p in store.folders(folder / store.FOLDER) if (s := store.step_of(p.name)) is not None and s > step]
    if newer:
        raise UserError(
            f"{folder} is at step {newer[-1]}, and the remote at step {step}: go on with `trainkit resume {folder.name}`, "
            f"or choose another --runs"
        )
