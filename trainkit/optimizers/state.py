"""An optimizer's state by parameter name, which is what a checkpoint can hold and any layout can read."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainkit.errors import UserError


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter name>.<state key>` to tensor; numbers become float64 scalars. No hyperparameters: they are config."""
    named = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            for key, value in optimizer.state[parameter].items():
                if value is not None:
                    named[f"{name}.{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value)).double()
    return named


def places(model: nn.Module, described: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Tensor]:
    """Room for the state of those names, shapes and dtypes: laid out as the parameter that it belongs to, wherever that lies.

    Raises:
        UserError: a name belongs to no parameter here, or a shape is another's.
    """
    parameters = dict(model.named_parameters())
    made = {}
    for full, (shape, dtype) in described.items():
        parameter = parameters.get(full.rpartition(".")[0])
        if parameter is None:
            raise UserError(f"the checkpoint's optimizer has state for {full}, which this model lacks")
        if shape and tuple(shape) != tuple(parameter.shape):
            raise UserError(f"the checkpoint's optimizer is another's: {full} is {tuple(shape)} there")
        made[full] = torch.empty_like(parameter.detach(), dtype=dtype) if shape else torch.empty((), dtype=dtype)
    return made


def load_named_state(model: nn.Module, optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> None:
    """Give `optimizer`, freshly built or not, the state that `named_state` took. The tensors are its own from now on.

    Raises:
        UserError: a name belongs to no parameter here, or a shape is another's.
    """
    parameters, left = dict(model.named_parameters()), dict(named)
    for name, parameter in parameters.items():
        state = {}
        for full in [f for f in left if f.rpartition(".")[0] == name]:
            key, value = full.rpartition(".")[2], left.pop(full)
            if value.ndim and value.shape != parameter.shape:
                raise UserError(f"the checkpoint's optimizer is another's: {full} is {tuple(value.shape)} there")
            on_device = value.ndim > 0 or _device_scalars(optimizer)
            state[key] = value.to(parameter.device if on_device else "cpu")
        if state:
            optimizer.state[parameter] = state
        elif named and parameter.requires_grad:
            raise UserError(f"the checkpoint's optimizer has no state for {name}")
    if left:
        raise UserError(f"the checkpoint's optimizer has state for {sorted(left)[0]}, which this model lacks")


def _device_scalars(optimizer: torch.optim.Optimizer) -> bool:
    """Fused kernels keep their step count beside the weights."""
    return any(group.get("fused") for group in optimizer.param_groups)
