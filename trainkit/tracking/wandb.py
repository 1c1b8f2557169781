"""Weights & Biases (https://docs.wandb.ai), extra `wandb`. A resumed run goes on in the same one there."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trainkit import atomic
from trainkit.config import config
from trainkit.errors import UserError

RUN_ID = "wandb_run_id"


@config
class Wandb:
    """`mode` offline keeps everything in the run's folder until `wandb sync`."""

    project: str = "trainkit"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"

    def build(self, folder: Path) -> "WandbTracker":
        """A tracker that connects when the run starts.

        Raises:
            UserError: wandb is not installed.
        """
        if importlib.util.find_spec("wandb") is None:
            raise UserError("tracking=wandb needs its package: pip install 'trainkit[wandb]'")
        return WandbTracker(folder, self)


class WandbTracker:
    def __init__(self, folder: Path, cfg: Wandb) -> None:
        self._folder, self._cfg = folder, cfg

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        import wandb

        known = self._folder / RUN_ID
        self._run: Any = wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            mode=self._cfg.mode,
            name=self._folder.name,
            dir=str(self._folder),
            id=known.read_text() if known.exists() else None,
            resume="allow",
            config={**header, "run.yaml": config},
        )
        atomic.write(known, str(self._run.id).encode())

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def go_back(self, step: int) -> None:
        """W&B keeps its first record of a step, and takes new steps again once the run is past it."""

    def text(self, step: int, tag: str, text: str) -> None:
        import wandb

        self._run.log({tag: wandb.Html(f"<pre>{text.replace('<', '&lt;')}</pre>")}, step=step)

    def note(self, message: str) -> None:
        """Notes are for the person who watches."""

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("done", "patience") else 1)
