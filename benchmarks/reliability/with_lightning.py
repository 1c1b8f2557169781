"""Lightning's ModelCheckpoint, which also keeps `last.ckpt` for `fit(ckpt_path="last")`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.reliability.server import LAST, Watch


class Resumed(Exception):
    """Ends a run as soon as its state is known."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 64)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def state_of(trainer: Trainer) -> dict[str, Any]:
    moments = {i: dict(moments) for i, moments in trainer.optimizers[0].state_dict()["state"].items()}
    model = trainer.lightning_module.state_dict()
    scheduler = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    return {"model": model, "optimizer": moments, "scheduler": scheduler, "step": trainer.global_step}


class Watched(ModelCheckpoint):
    """The library's own, telling a watch when it saves."""

    watch: Watch

    def on_train_batch_end(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        self.watch.saving(trainer.global_step, state_of(trainer))
        super().on_train_batch_end(trainer, *rest, **named)
        self.watch.saved(trainer.global_step)


class Beginning(Callback):
    """The state before the first step: told to a watch, or all that is wanted."""

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Trainer, *rest: Any, **named: Any) -> None:
        if self.watch is None:
            raise Resumed(state_of(trainer))
        if trainer.global_step == 0:
            self.watch.saving(0, state_of(trainer))


class Lightning:
    def fit(self, folder: Path, steps: int, watch: Watch | None, path: str | None) -> None:
        saver = Watched(dirpath=folder, every_n_train_steps=1, save_last=True)
        if watch:
            saver.watch = watch
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            callbacks=[Beginning(watch), saver],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        rows = torch.utils.data.DataLoader(torch.ones(16, 64), batch_size=2)
        trainer.fit(Tiny(), rows, ckpt_path=path)

    def train(self, folder: Path, watch: Watch) -> None:
        self.fit(folder, LAST, watch, None)

    def resume(self, folder: Path, path: Path | None) -> Mapping[str, Any] | None:
        try:
            self.fit(folder, LAST + 1, None, str(path) if path else "last")
        except Resumed as resumed:
            return resumed.state
        raise AssertionError("it took no step after the resume")

    def checkpoints(self, folder: Path) -> list[Path]:
        return sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
