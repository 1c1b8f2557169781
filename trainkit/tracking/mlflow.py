"""MLflow (https://mlflow.org), extra `mlflow`. A resumed run goes on in the same one there."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit import atomic
from trainkit.config import config
from trainkit.errors import UserError

RUN_ID = "mlflow_run_id"


@config
class Mlflow:
    """`uri` is a tracking server's address; null is what MLFLOW_TRACKING_URI says."""

    experiment: str = "trainkit"
    uri: str | None = None

    def build(self, folder: Path) -> "MlflowTracker":
        """A tracker that connects when the run starts.

        Raises:
            UserError: mlflow is not installed.
        """
        if importlib.util.find_spec("mlflow") is None:
            raise UserError("tracking=mlflow needs its package: pip install 'trainkit[mlflow]'")
        return MlflowTracker(folder, self)


class MlflowTracker:
    def __init__(self, folder: Path, cfg: Mlflow) -> None:
        self._folder, self._cfg = folder, cfg

    def start(self, header: Mapping[str, str], step: int, steps: int, config: str) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        if self._cfg.uri is not None:
            mlflow.set_tracking_uri(self._cfg.uri)
        mlflow.set_experiment(self._cfg.experiment)
        known = self._folder / RUN_ID
        run = mlflow.start_run(run_id=known.read_text() if known.exists() else None, run_name=self._folder.name)
        atomic.write(known, run.info.run_id.encode())
        mlflow.log_text(config, "run.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def go_back(self, step: int) -> None:
        """MLflow keeps both records of a step, by time."""

    def text(self, step: int, tag: str, text: str) -> None:
        self._mlflow.log_text(text, f"{tag}/{step}.txt")

    def note(self, message: str) -> None:
        """Notes are for the person who watches."""

    def close(self, status: str) -> None:
        self._mlflow.end_run("FINISHED" if status in ("done", "patience") else "FAILED")
