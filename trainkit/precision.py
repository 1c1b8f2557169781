"""The number formats of parameters and of matrix products, and the gradient scaler that float16 needs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.config import config
from trainkit.errors import UserError

MULTIPLE = 16  # of which both sides of a float8 matrix have to be


@config
class Float8:
    """Linear layers inside blocks multiply in float8 (Micikevicius et al. 2022, arXiv:2209.05433), through torchao.

    `recipe`: one scale a tensor, or a row, which costs time and is more accurate. `emulate` computes the same numbers where
    the device has no float8, far slower: for tests.
    """

    recipe: Literal["tensorwise", "rowwise"] = "rowwise"
    emulate: bool = False


@config
class Precision:
    """`params` is what is stored and updated; `compute` what matrices are multiplied in, through autocast (Micikevicius
    et al. 2018, arXiv:1710.03740), null being the same; `tf32` lets an NVIDIA GPU round float32 products to TF32.

    `rounding` is how updates of bfloat16 parameters are written: see `trainkit.optimizers.rounding`. `float8` multiplies the
    blocks' matrices in that.
    """

    params: Literal["float32", "float64", "bfloat16"] = "float32"
    compute: Literal["bfloat16", "float16"] | None = None
    tf32: bool = False
    rounding: Literal["stochastic", "nearest", "master"] | None = None
    float8: Float8 | None = None

    def __post_init__(self) -> None:
        if self.params == "float64" and self.compute is not None:
            raise ValueError(f"precision.params=float64 computes in float64: precision.compute={self.compute} must go")
        if self.params == "bfloat16" and self.compute is not None:
            raise ValueError(
                f"precision.params=bfloat16 computes in bfloat16: precision.compute={self.compute} must go"
            )
        if self.params == "bfloat16" and self.rounding is None:
            raise ValueError("precision.params=bfloat16 needs precision.rounding: stochastic, nearest or master")
        if self.params != "bfloat16" and self.rounding is not None:
            raise ValueError(
                f"precision.rounding={self.rounding} is of bfloat16 parameters, and these are {self.params}"
            )
        if self.float8 is not None and self.matmul_dtype() != torch.bfloat16:
            raise ValueError("precision.float8 starts from bfloat16: it needs precision.compute=bfloat16")

    def check(self, device: torch.device) -> None:
        """Raise UserError when this device, or this installation, cannot compute so."""
        if self.float8 is None:
            return
        try:
            import torchao.float8  # noqa: F401
        except ImportError as error:
            raise UserError(
                "precision.float8 needs torchao: pip install 'trainkit[quant]', or use precision=bf16"
            ) from error
        if not self.float8.emulate and not has_float8(device):
            raise UserError(
                f"precision.float8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), which this "
                f"{device.type} device is not: use precision=bf16"
            )

    def to_use(self, device: torch.device) -> "Precision":
        """The precision to use a trained model in: float8 only where the device has it. Its weights are stored wider."""
        return self if self.float8 is None or has_float8(device) else replace(self, float8=None)

    def matmul_dtype(self) -> torch.dtype:
        """What matrices are multiplied in, float8 aside."""
        dtype: torch.dtype = getattr(torch, self.compute or self.params)
        return dtype

    def apply(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with its parameters in `params` and its forward under autocast to `compute`."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        model = model.to(getattr(torch, self.params))
        if self.float8 is not None:
            _to_float8(model, self.float8)
        return self.cast(model, device)

    def cast(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` with its forward under autocast to `compute`."""
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


def has_float8(device: torch.device) -> bool:
    """Whether matrices can be multiplied in float8 here."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _to_float8(model: nn.Module, float8: Float8) -> None:
    """Exchange the blocks' linear layers, in place. Parameters, and their names, stay; the head stays as it is."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0

    how = replace(Float8LinearConfig.from_recipe_name(float8.recipe), emulate=float8.emulate)
    for block in model.backbone.blocks:  # type: ignore[union-attr]  # a ModuleList
        convert_to_float8_training(block, module_filter_fn=fits, config=how)


def scaler_state(scaler: torch.amp.GradScaler) -> dict[str, float]:
    """What a scaler has found out: its factor, and the steps since the last change. What the config knows is not in it."""
    state = scaler.state_dict()
    return {key: state[key] for key in ("scale", "_growth_tracker")} if state else {}


def load_scaler_state(scaler: torch.amp.GradScaler, state: Mapping[str, Any]) -> None:
    """Go on from what `scaler_state` gave."""
    if scaler.is_enabled() and state:
        scaler.load_state_dict({**scaler.state_dict(), **state})
