"""An optimizer's state by parameter name, which is what a checkpoint can hold and any layout can read.

A state key names its format (`exp_avg`, or `exp_avg_int8` and `exp_avg_int8_scale`): what is loaded comes into the format
that the optimizer keeps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.optimizers.coding import Coded, coded
from trainkit.optimizers.formats import code_of
from trainkit.optimizers.sharded import format_of, room, state_in, whole_columns


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter name>.<state key>` to tensor; numbers become float64 scalars. No hyperparameters: they are config."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            for key, value in optimizer.state[parameter].items():
                if value is not None:
                    named[f"{name}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value)).double()
    return named


def places(
    model: nn.Module, optimizer: torch.optim.Optimizer, described: Mapping[str, tuple[Sequence[int], torch.dtype, bool]]
) -> dict[str, Any]:
    """Room for the state of those names, shapes and dtypes, and whether it comes in whole rows: laid out as the parameter
    that it belongs to, where `optimizer` keeps states. Numbers of which it keeps codes get a place that makes them.

    Raises:
        UserError: a name belongs to no parameter here, or a shape is another's.
    """
    parameters = dict(model.named_parameters())
    made = {}
    for full, (shape, dtype, whole_rows) in described.items():
        name, _, key = full.rpartition(".")
        if name not in parameters:
            raise UserError(f"the checkpoint's optimizer has state for {full}, which this model lacks")
        _refuse_shape(full, shape, parameters[name])
        if code_of(key) and dtype != (torch.float32 if key.endswith("_scale") else torch.uint8):
            raise UserError(f"the checkpoint's optimizer is another's: {full} is {dtype} there")
        device = _device(optimizer, parameters[name])
        codes = coded(optimizer, parameters[name], key, dtype, device) if shape and whole_rows else None
        made[full] = codes or (room(parameters[name], shape, dtype, device) if shape else torch.empty((), dtype=dtype))
    return made


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, named: Mapping[str, Any]) -> None:
    """Give `optimizer`, freshly built or not, the state that `named_state` took, or what `places` gave. The tensors are
    its own from now on, or are converted to the format that it keeps.

    Raises:
        UserError: a name belongs to no parameter here, or a shape is another's.
    """
    parameters, left = dict(model.named_parameters()), dict(named)
    for name, parameter in parameters.items():
        state: dict[str, Tensor] = {}
        for full in [f for f in left if f.rpartition(".")[0] == name]:
            key, value = full.rpartition(".")[2], left.pop(full)
            _refuse_shape(full, value.shape, parameter)
            if isinstance(value, Coded):
                state |= value.state
                continue
            on_device = value.ndim > 0 or _device_scalars(optimizer)
            state[key] = value.to(_device(optimizer, parameter) if on_device else "cpu")
        if alone := [k for k in state if code_of(k) and f"{k.removesuffix('_scale')}_scale" not in state]:
            raise UserError(f"the checkpoint's optimizer has {name}.{alone[0]} without its scales")
        if state:
            optimizer.state[parameter] = state_in(format_of(optimizer, parameter), parameter, state)
        elif named and parameter.requires_grad:
            raise UserError(f"the checkpoint's optimizer has no state for {name}")
    if left:
        raise UserError(f"the checkpoint's optimizer has state for {sorted(left)[0]}, which this model lacks")
    if hasattr(optimizer, "reread"):
        optimizer.reread()


def _refuse_shape(full: str, shape: Sequence[int], parameter: Tensor) -> None:
    expected = (*parameter.shape[:-1], whole_columns(full.rpartition(".")[2], parameter)) if parameter.ndim else ()
    if tuple(shape) not in ((), expected):
        raise UserError(f"the checkpoint's optimizer is another's: {full} is {tuple(shape)} there")


def _device(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where the states of a parameter are kept."""
    return getattr(optimizer, "keeps_on", parameter.device)


def _device_scalars(optimizer: torch.optim.Optimizer) -> bool:
    """Fused kernels keep their step count beside the weights, as ours do."""
    return any(group.get("fused") for group in optimizer.param_groups)
