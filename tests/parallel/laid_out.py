"""Many layouts in one group of ranks: what each learns, against one process."""

from typing import Any

import torch

from tests.conftest import SMALL
from trainkit import build
from trainkit import run as runs
from trainkit.learner import MODEL, Learner
from trainkit.parallel import Parallel, Ranks
from trainkit.slices import chunks

STEPS = 6
TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4}
PLAIN = [*SMALL, "optimizer=sgd", "optimizer.lr=0.1", "clip=0", "data.batch=12", "data.length=24", "name=t"]
PLAIN += ["model.width=32", "model.depth=4", "model.attention.heads=4", "parallel.device=cpu"]
MODELS = {
    "llama": ["model.attention.kv_heads=2", "model.attention.qk_norm=true", "model.tied=false"],
    "gpt2": [
        *("model.norm=layernorm", "model.bias=true", "model.position=learned", "model.mlp.activation=gelu"),
        *("model.attention.window=9",),
    ],
}
Learned = dict[str, Any]  # weights by name, and what every step said


def learned(words: list[str], joined: Ranks | None = None) -> tuple[Learned, Learner]:
    """What a run learns in a few steps."""
    run = runs.composed([*PLAIN, *words])
    if joined is not None:
        build.check(run)
    ranks = build.ranks(run) if joined is None else run.parallel.lay_out(joined, stream=run.memory.stream is not None)
    it = build.learner(run, run.data.open(), ranks)
    said = [it.train_step() for _ in range(STEPS)]
    found = {name: t for name, t in it.tensors().items() if name.startswith(MODEL)}
    told = {key: [float(metrics[key]) for metrics in said] for key in ("loss", "grad_norm")}
    told["val_loss"] = [it.evaluate(it.loader.validation(2), lambda: False)["val_loss"]]  # type: ignore[index]
    return found | told, it


def reference(words: list[str]) -> Learned:
    """What one process learns; its tensors as arrays, which can be sent to ranks."""
    alone, _ = learned([w for w in words if not w.startswith("parallel")])
    return {name: t.double().numpy() if isinstance(t, torch.Tensor) else t for name, t in alone.items()}


def neutral(cases: list[tuple[list[str], Learned]]) -> None:
    """On every rank: each case's words teach what one process learns."""
    joined = Parallel(kind="ddp", device="cpu").join(torch.device("cpu"))
    for words, alone in cases:
        ours, it = learned(words, joined)
        tolerance = TOLERANCE["fp64" if "precision=fp64" in words else "fp32"]
        missing = alone.keys() - ours.keys()
        assert not missing or it.ranks.stages, (words, missing)
        for name, value in ours.items():
            if isinstance(value, list):
                said = f"{words} {name}"
                torch.testing.assert_close(value, alone[name], rtol=tolerance, atol=0, msg=lambda m, s=said: f"{s} {m}")
                continue
            whole = torch.from_numpy(alone[name])
            assert tuple(value.shape) == tuple(whole.shape)
            for offset, shape, part in chunks(value):
                own = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
                scale = float(whole.abs().max())
                worst = float((part.double() - own).abs().max()) / scale
                assert worst <= tolerance, (words, name, worst)
    joined.leave()
