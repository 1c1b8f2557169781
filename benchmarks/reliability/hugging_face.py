"""The Hugging Face Trainer, and a loop of one's own with Accelerate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.reliability.by_hand import numbered
from benchmarks.reliability.server import LAST, Watch


class Resumed(Exception):
    """Ends a run as soon as its state is known."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


def state_of(model: Any, optimizer: Any, scheduler: Any, step: int) -> dict[str, Any]:
    moments = {i: dict(moments) for i, moments in optimizer.state_dict()["state"].items()}
    return {"model": model.state_dict(), "optimizer": moments, "scheduler": scheduler.last_epoch, "step": step}


class Telling(TrainerCallback):
    """Tells a watch what is being saved; without one, ends the run at its first step."""

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch

    def on_step_begin(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        it = state_of(of["model"], of["optimizer"], of["lr_scheduler"], state.global_step)
        if self.watch is None:
            raise Resumed(it)
        if state.global_step == 0:
            self.watch.saving(0, it)

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        assert self.watch is not None
        step = state.global_step
        self.watch.saving(step, state_of(of["model"], of["optimizer"], of["lr_scheduler"], step))

    def on_save(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        assert self.watch is not None
        self.watch.saved(state.global_step)


class HfTrainer:
    def trainer(self, folder: Path, steps: int, watch: Watch | None) -> Trainer:
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
        rows = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(16)]
        return Trainer(model=model, args=args, train_dataset=rows, callbacks=[Telling(watch)])

    def train(self, folder: Path, watch: Watch) -> None:
        self.trainer(folder, LAST, watch).train()

    def resume(self, folder: Path, path: Path | None) -> Mapping[str, Any] | None:
        try:
            self.trainer(folder, LAST + 1, None).train(resume_from_checkpoint=str(path) if path else True)
        except Resumed as resumed:
            return resumed.state
        raise AssertionError("it took no step after the resume")

    def checkpoints(self, folder: Path) -> list[Path]:
        return numbered(folder, "checkpoint-*")


class Steps:
    """The loop's own counter, which Accelerate saves with the rest."""

    def __init__(self) -> None:
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Accelerate:
    LIMIT: int

    def prepared(self, folder: Path) -> tuple[Accelerator, Any, Any, Any, Steps]:
        project = ProjectConfiguration(
            project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=self.LIMIT
        )
        accelerator = Accelerator(cpu=True, project_config=project)
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        steps = Steps()
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        accelerator.register_for_checkpointing(steps)
        return accelerator, model, optimizer, scheduler, steps

    def train(self, folder: Path, watch: Watch) -> None:
        accelerator, model, optimizer, scheduler, steps = self.prepared(folder)
        watch.saving(0, self.state(model, optimizer, scheduler, steps))
        for step in range(1, LAST + 1):
            accelerator.backward(model(torch.ones(2, 64)).square().mean())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            steps.done = step
            watch.saving(step, self.state(model, optimizer, scheduler, steps))
            accelerator.save_state()
            watch.saved(step)

    def state(self, model: Any, optimizer: Any, scheduler: Any, steps: Steps) -> dict[str, Any]:
        return state_of(model, optimizer, scheduler.scheduler, steps.done)

    def resume(self, folder: Path, path: Path | None) -> Mapping[str, Any] | None:
        accelerator, *parts = self.prepared(folder)
        accelerator.load_state(str(path) if path else None)
        return self.state(*parts)

    def checkpoints(self, folder: Path) -> list[Path]:
        return numbered(folder / "checkpoints", "checkpoint_*")


class AccelerateTwo(Accelerate):
    LIMIT = 2


class AccelerateOne(Accelerate):
    LIMIT = 1
