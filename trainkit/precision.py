"""The number formats of parameters and of matrix products, and the gradient scaler that float16 needs."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.config import config


@config
class Precision:
    """`params` is what is stored and updated; `compute` what matrices are multiplied in, through autocast (Micikevicius
    et al. 2018, arXiv:1710.03740), null being the same; `tf32` lets an NVIDIA GPU round float32 products to TF32."""

    params: Literal["float32", "float64"] = "float32"
    compute: Literal["bfloat16", "float16"] | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.params == "float64" and self.compute is not None:
            raise ValueError(f"precision.params=float64 computes in float64: precision.compute={self.compute} must go")

    def matmul_dtype(self) -> torch.dtype:
        """What matrices are multiplied in."""
        dtype: torch.dtype = getattr(torch, self.compute or self.params)
        return dtype

    def apply(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with its parameters in `params` and its forward under autocast to `compute`."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        model = model.to(getattr(torch, self.params))
        if self.compute is not None:
            model.forward = torch.autocast(device.type, dtype=self.matmul_dtype())(model.forward)
        return model

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """A scaler that does something for float16 only."""
        return torch.amp.GradScaler(device.type, enabled=self.compute == "float16")


def update_scaler(scaler: torch.amp.GradScaler, keep: Tensor) -> None:
    """Let a scaler's factor grow or halve by what was found in the last gradients, unless `keep` (a bool scalar on the
    device) says that it stays. Nobody waits for the device."""
    if not scaler.is_enabled():
        return
    known = (scaler._scale, scaler._growth_tracker)
    before = [tensor.clone() for tensor in known if tensor is not None]
    scaler.update()
    for tensor, was in zip(known, before, strict=True):
        assert tensor is not None  # it has scaled a loss, so that it has both
        tensor.copy_(torch.where(keep, was, tensor))


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """What a scaler has found out: its factor, and the steps since the last change. What the config knows is not in it."""
    state = scaler.state_dict()
    return {key: state[key] for key in ("scale", "_growth_tracker")} if state else {}


def load_scaler_state(scaler: torch.amp.GradScaler, state: Mapping[str, Any]) -> None:
    """Go on from what `scaler_state` gave."""
    if scaler.is_enabled() and state:
        scaler.load_state_dict({**scaler.state_dict(), **state})
