"""Layer streaming: parameters live on the host, and a block is on the device while it is used (Ren et al. 2021,
arXiv:2101.06840, for the optimizer's step on the host).

Grade: exact on one rank. On several it is FSDP2 with its CPU offload: reordered, as `parallel=fsdp` is. That room wraps the
blocks: here is what is moved. What lies outside blocks (embedding, last norm, head) is there from forward to backward.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from trainkit.config import config


@config
class Stream:
    """A block comes in for its forward and again for its backward, gradients leave after every microbatch, and the optimizer
    steps on the host."""

    grade: ClassVar[str] = "exact"

    def check(self, *, memory: Any, parallel: Any, deterministic: str, precision: Any, **_: Any) -> None:
        """Raise ValueError, in one sentence, where something else wants the whole model or its gradients on the device."""
        for wrong, why in {
            "memory=stream holds slices of the model and parallel=ddp all of it: use parallel=fsdp": (parallel.copies),
            "deterministic=elastic sums whole gradients itself: memory=stream has slices of them": (
                deterministic == "elastic"
            ),
            "memory=stream steps on the host, where float16's scaler has no part: use precision=bf16": (
                precision.compute == "float16"
            ),
            "memory=stream steps on the host already: memory=offload_optimizer must go": memory.offload_optimizer,
            "memory=stream brings gradients to the host after the backward: memory=step_in_backward must go": (
                memory.step_in_backward
            ),
            f"memory=stream keeps gradients in the parameters' format: memory.grad_dtype={memory.grad_dtype} must go": (
                memory.grad_dtype
            ),
        }.items():
            if why:
                raise ValueError(wrong)

    def apply(self, model: nn.Module) -> nn.Module:
        """`model`, which counts what will be moved."""
        passes = Passes(model)
        model.register_forward_pre_hook(passes.see)
        model.memory_stats = [*getattr(model, "memory_stats", []), passes.stats]  # type: ignore[assignment]
        return model


class Passes:
    """Bytes that a rank's own slices move between host and device, by how often the model is passed through."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward = self._backward = 0

    def see(self, module: nn.Module, arguments: Any) -> None:
        """A forward begins; in training a backward follows."""
        self._forward += 1
        self._backward += module.training

    def stats(self) -> dict[str, float]:
        """Gigabytes in and out since the last call. Ask between steps, when parameters lie in slices."""
        everything = sum(_local(p).nbytes for p in self._model.parameters())
        learned = sum(_local(p).nbytes for p in self._model.parameters() if p.requires_grad)
        blocks = sum(_local(p).nbytes for p in self._model.backbone.blocks.parameters())  # type: ignore[union-attr, misc]
        moved = self._forward * everything + self._backward * (blocks + learned)
        self._forward = self._backward = 0
        return {"stream_gb": moved / 1e9}


def _local(parameter: Tensor) -> Tensor:
    """This rank's slice of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
