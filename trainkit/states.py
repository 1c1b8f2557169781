"""All that is learned, by name: what a model and its optimizer hold on this rank, as a checkpoint has it of the whole.

A model that was divided over ranks says how by its `layout`: then a rank has parts of tensors, or not all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.optimizers import state as states
from trainkit.slices import Part


def of_model(model: nn.Module) -> dict[str, Any]:
    """The model's tensors, or this rank's parts of them."""
    return {name: _part(model, name, tensor) for name, tensor in model.state_dict().items()}


def of_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's, by `<parameter name>.<state key>`."""
    named = states.named_state(model, optimizer)
    return {full: _part(model, full.rpartition(".")[0], tensor, full) for full, tensor in named.items()}


def places(
    model: nn.Module, optimizer: torch.optim.Optimizer, described: Mapping[str, tuple[Sequence[int], torch.dtype, bool]]
) -> dict[str, Any]:
    """Room for an optimizer's state of those names, whole shapes and dtypes, and whether it lies in whole rows.

    Raises:
        UserError: a name or a shape is another optimizer's, or cannot be divided as the model is.
    """
    layout = _layout(model)
    if layout is None:
        return states.places(model, optimizer, described)
    mine, cuts = {}, {}
    for full, (shape, dtype, whole_rows) in described.items():
        name = full.rpartition(".")[0]
        if name not in layout.shapes:
            raise UserError(f"the checkpoint's optimizer has state for {full}, which this model lacks")
        if name not in layout.here:
            continue  # another stage has it
        cut = layout.cuts.get(name) if shape else None
        if cut is not None:
            if tuple(shape[:-1]) != cut.shape[:-1]:
                raise UserError(f"the checkpoint's optimizer is another's: {full} is {tuple(shape)} there")
            cuts[full] = _beside(cut, shape, full)
        whole_rows = whole_rows and (cut is None or cut.dim == 0)
        mine[full] = (cuts[full].here if cut is not None else shape), dtype, whole_rows
    made = states.places(model, optimizer, mine)
    return {full: Part(place, cuts[full]) if full in cuts else place for full, place in made.items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, named: Mapping[str, Any]) -> None:
    """Give `optimizer` the state that `of_optimizer` took, or what `places` gave.

    Raises:
        UserError: a name belongs to no parameter here, or a shape is another's.
    """
    states.load_named_state(model, optimizer, {n: v.values if isinstance(v, Part) else v for n, v in named.items()})


def load_model(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Copy a checkpoint's tensors into `model`, in place.

    Raises:
        UserError: a name or a shape is not the model's.
    """
    if _layout(model) is None:
        check_model(model, {name: tensor.shape for name, tensor in given.items()})
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            value = given[name].values if isinstance(given[name], Part) else given[name]
            if _memory(value) != _memory(tensor):  # else it was read straight into the model
                tensor.copy_(value)


def check_model(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError when a name or a shape is not the model's."""
    layout = _layout(model)
    own = layout.shapes if layout else {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(own.keys() | shapes.keys()):
        if name not in shapes or name not in own:
            where = "lacks" if name not in shapes else "has, and this model lacks,"
            raise UserError(f"the checkpoint is another model's: it {where} the tensor {name}")
        if tuple(shapes[name]) != own[name]:
            raise UserError(
                f"the checkpoint is another model's: {name} is {tuple(shapes[name])} there and {own[name]} here"
            )


def _layout(model: nn.Module) -> Any:
    return getattr(model, "layout", None)


def _part(model: nn.Module, name: str, tensor: Tensor, full: str | None = None) -> Any:
    layout = _layout(model)
    cut = layout.cuts.get(name) if layout is not None and tensor.ndim else None
    if cut is None:
        return tensor
    if tuple(tensor.shape) == cut.here:
        return Part(tensor, cut)
    whole = (*cut.shape[:-1], tensor.shape[-1] if cut.dim == 0 else tensor.shape[-1] * cut.shape[-1] // cut.here[-1])
    return Part(tensor, _beside(cut, whole, full or name))


def _beside(cut: Any, shape: Sequence[int], full: str) -> Any:
    try:
        return cut.beside(shape)
    except ValueError as error:
        raise UserError(f"{full} is kept in blocks that parallel.tp would cut: use fewer ranks, or float32") from error


def _memory(tensor: Tensor) -> int:
    """Where this rank's part of a tensor lies."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).data_ptr()
