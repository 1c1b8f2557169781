"""Systems that a person puts together: a call that writes a state, and one that reads it."""

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reliability.server import LAST, Watch
from trainkit import checkpoint


def content(step: int) -> dict[str, Tensor]:
    """A state of 50 KB that tells its step in every tensor."""
    shapes = {"model.a": (64, 64), "model.b": (64,), "optimizer.a": (2, 64, 64), "optimizer.b": (2, 64)}
    tensors = {name: torch.full(shape, float(step)) for name, shape in shapes.items()}
    return {**tensors, "step": torch.tensor(step)}


def numbered(folder: Path, pattern: str) -> list[Path]:
    """The paths of that pattern by the last number in their name, the highest first."""
    return sorted(folder.glob(pattern), key=lambda p: int(re.findall(r"\d+", p.stem)[-1]), reverse=True)


class ByHand(ABC):
    """A loop that saves a state after every step."""

    @abstractmethod
    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        """Save `state`."""

    @abstractmethod
    def read(self, path: Path) -> Mapping[str, Any]:
        """The state that was saved there."""

    @abstractmethod
    def checkpoints(self, folder: Path) -> list[Path]:
        """What can be read, the newest first."""

    def train(self, folder: Path, watch: Watch) -> None:
        for step in range(1, LAST + 1):
            state = content(step)
            watch.saving(step, state)
            self.write(folder, step, state)
            watch.saved(step)

    def resume(self, folder: Path, path: Path | None) -> Mapping[str, Any] | None:
        path = path or next(iter(self.checkpoints(folder)), None)
        return self.read(path) if path else None


class InPlace(ByHand):
    FILE = "ckpt.pt"

    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        torch.save(state, folder / self.FILE)

    def read(self, path: Path) -> Mapping[str, Any]:
        return torch.load(path)

    def checkpoints(self, folder: Path) -> list[Path]:
        return list(folder.glob(self.FILE))


class Replaced(InPlace):
    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        partial = folder / f"{self.FILE}.tmp"
        torch.save(state, partial)
        os.replace(partial, folder / self.FILE)


class Safetensors(InPlace):
    FILE = "ckpt.safetensors"

    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        save_file(dict(state), folder / self.FILE)

    def read(self, path: Path) -> Mapping[str, Any]:
        return load_file(path)


class DcpInPlace(ByHand):
    """One folder that every save overwrites, which is what `dcp.save` does unless it is told not to."""

    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        dcp.save(dict(state), checkpoint_id=folder / "checkpoint")

    def read(self, path: Path) -> Mapping[str, Any]:
        state = {name: torch.zeros_like(tensor) for name, tensor in content(0).items()}
        dcp.load(state, checkpoint_id=path)
        return state

    def checkpoints(self, folder: Path) -> list[Path]:
        return list(folder.glob("checkpoint"))


class DcpSteps(DcpInPlace):
    """A folder a step, as torchtitan does: the newest that has `.metadata` is loaded, and the newest two are kept."""

    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        dcp.save(dict(state), checkpoint_id=folder / f"step-{step}")
        for old in numbered(folder, "step-*")[2:]:
            shutil.rmtree(old, ignore_errors=True)

    def checkpoints(self, folder: Path) -> list[Path]:
        return [path for path in numbered(folder, "step-*") if (path / ".metadata").is_file()]


class Trainkit(ByHand):
    def build(self, folder: Path) -> checkpoint.Checkpointer:
        policy = checkpoint.Checkpoint(every=1, keep=2, keep_best=0)
        it = policy.build(folder, higher_is_better=False, versions={})
        it.preflight(0)
        return it

    def train(self, folder: Path, watch: Watch) -> None:
        self.checkpointer = self.build(folder)
        super().train(folder, watch)

    def write(self, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
        facts = {"metric": None, "epoch_end": False, "epoch": 0.0, "val_loss": None}
        tensors = {name: tensor for name, tensor in state.items() if name != "step"}
        self.checkpointer.save(step, tensors, {"step": step}, {"run.yaml": b"name: a run\n"}, facts=facts)
        self.checkpointer.wait()
        for outcome in self.checkpointer.finished():
            if outcome.error:
                raise outcome.error

    def read(self, path: Path) -> Mapping[str, Any]:
        return self.state(checkpoint.load(path))

    def state(self, loaded: checkpoint.Loaded) -> Mapping[str, Any]:
        return {**loaded.tensors, "step": torch.tensor(loaded.state["step"])}

    def resume(self, folder: Path, path: Path | None) -> Mapping[str, Any] | None:
        if path:
            return self.read(path)
        found = self.build(folder).load_latest()
        return self.state(found) if found else None

    def checkpoints(self, folder: Path) -> list[Path]:
        return numbered(folder / checkpoint.FOLDER, "step-*")
