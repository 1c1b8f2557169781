"""The peers of vs_peers.py: nanoGPT, the Hugging Face Trainer and a plain torch loop, each taking a few steps a turn."""

import importlib.util
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

LAYERS, HEADS, WIDTH, VOCAB, CONTEXT, BATCH = 6, 6, 384, 50304, 256, 8
STEPS = 3  # of one system before the next has its turn, after one that is not counted: its data was pushed out of all caches

Turn = Callable[[], list[float]]  # takes 1 + STEPS steps and gives the seconds of all but the first


def timed(step: Callable[[], object]) -> Turn:
    def turn() -> list[float]:
        seconds = []
        for _ in range(1 + STEPS):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
        return seconds[1:]

    return turn


def autocast(precision: str) -> Any:
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def random_rows(data: Path) -> Callable[[], tuple[Any, Any]]:
    """nanoGPT's way of reading: a memory map and random offsets."""
    import numpy as np
    import torch

    ids = np.memmap(data / "train.bin", dtype=np.uint16, mode="r")

    def rows() -> tuple[Any, Any]:
        begins = torch.randint(len(ids) - CONTEXT, (BATCH,)).tolist()
        windows = torch.stack([torch.from_numpy(ids[b : b + CONTEXT + 1].astype(np.int64)) for b in begins])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    return rows


def loop(model: Any, optimizer: Any, loss_of: Callable[[Any, Any], Any], precision: str, data: Path) -> Turn:
    """The usual loop."""
    import torch

    rows = random_rows(data)

    def step() -> None:
        x, y = rows()
        with autocast(precision):
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return timed(step)


def nanogpt(precision: str, compiled: bool, data: Path, checkout: Path) -> Turn:
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cfg = module.GPTConfig(CONTEXT, VOCAB, LAYERS, HEADS, WIDTH, 0.0, False)
    model = module.GPT(cfg)
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.99), "cpu")
    called = torch.compile(model) if compiled else model
    return loop(model, optimizer, lambda x, y: called(x, y)[1], precision, data)


def gpt2() -> Any:
    import transformers

    cfg = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(cfg)


def plain(precision: str, compiled: bool, data: Path) -> Turn:
    """transformers' GPT-2 in a plain torch loop with torch's fused AdamW."""
    import torch
    from torch.nn import functional as F

    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    called = torch.compile(model) if compiled else model

    def loss_of(x: Any, y: Any) -> Any:
        return F.cross_entropy(called(x).logits.float().flatten(0, 1), y.flatten())

    return loop(model, optimizer, loss_of, precision, data)


def hf_trainer(precision: str, compiled: bool, data: Path, folder: Path) -> Turn:
    """The Trainer's own loop; its callbacks mark where steps begin and end."""
    import torch
    import transformers

    rows = random_rows(data)

    class Endless(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return BATCH * 1000

        def __getitem__(self, i: int) -> dict[str, Any]:
            x, _ = rows()
            return {"input_ids": x[0], "labels": x[0]}

    class Marks(transformers.TrainerCallback):  # type: ignore[misc]
        begin = 0.0
        seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.begin)

    marks, model = Marks(), gpt2()
    if compiled:
        model.compile()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=1 + STEPS,
        learning_rate=3e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        use_cpu=True,
        optim="adamw_torch_fused",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Endless(), callbacks=[marks])
    trainer.remove_callback(transformers.PrinterCallback)

    def turn() -> list[float]:
        marks.seconds.clear()
        trainer.train()
        return marks.seconds[1:]

    return turn
