"""A tensor that lies on the ranks as a parameter does: slices of the same rows, or of the same columns."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.optimizers.formats import BLOCK, code_of, columns, converted
from trainkit.slices import chunks


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def beside(parameter: Tensor, part: Tensor, last: int) -> Tensor:
    """`part` as this rank's part of a tensor that is sliced as `parameter` is, and as large, but for `last` columns.

    The part may lie on another device than the parameter does.
    """
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    shape = torch.Size((*parameter.shape[:-1], last))
    strides = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(shape, strides, part.dtype)
    # from_local would move the part to the mesh's device
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, tensor_meta=meta)  # type: ignore[attr-defined]
    return DTensor(part.contiguous(), spec, requires_grad=False)


def whole(parameter: Tensor, tensor: Tensor) -> Tensor:
    """All of a tensor that is sliced as `parameter` is, on every rank's GPU if there are some."""
    if not hasattr(parameter, "to_local"):
        return tensor
    there = local(tensor).to(parameter.device_mesh.device_type)  # type: ignore[attr-defined]  # a DTensor has it
    found: Tensor = beside(parameter, there, tensor.shape[-1]).full_tensor()  # type: ignore[attr-defined]  # nor a plain one
    return found


def part(parameter: Tensor, whole: Tensor) -> Tensor:
    """What this rank has of all of a tensor that would be sliced as `parameter` is, on its device."""
    own = local(parameter)
    for begin, shape, _ in chunks(parameter):
        whole = whole[tuple(slice(first, first + n) for first, n in zip(begin, shape, strict=True))]
    return whole.to(own.device) if own.numel() else own


def room(parameter: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a state of that whole shape, laid out as its parameter."""
    own = local(parameter.detach())
    if tuple(shape) == tuple(parameter.shape):
        last = own.shape[-1]
    else:
        last = shape[-1] * own.shape[-1] // parameter.shape[-1] if own.shape[-1] != parameter.shape[-1] else shape[-1]
    part = torch.empty((*own.shape[:-1], last), dtype=dtype, device=device)
    return beside(parameter, part, shape[-1])


def refuse_cut_blocks(parameter: Tensor) -> None:
    """Raise UserError where ranks hold parts of rows that are no whole blocks."""
    width, here = parameter.shape[-1], local(parameter).shape[-1]
    if here not in (0, width) and (here % BLOCK or width % here):
        raise UserError(
            f"a row of {width} numbers over ranks of {here} cuts blocks of {BLOCK}, in which low-bit states are kept: "
            f"use fewer ranks for a row, or states of float32"
        )


def format_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> str | None:
    """The format that `optimizer` keeps a parameter's states in; None: as numbers."""
    return optimizer.format_of(parameter) if hasattr(optimizer, "format_of") else None


def state_in(format_: str | None, parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state in that format (None: numbers of its dtype), whatever it is in."""
    parts = {key: local(value) for key, value in state.items()}
    made = converted(parts, format_, local(parameter).shape[-1], parameter.dtype)
    return {
        key: state[key] if value is parts.get(key) else beside(parameter, value, whole_columns(key, parameter))
        for key, value in made.items()
    }


def whole_columns(key: str, parameter: Tensor) -> int:
    """How many columns the state of that key has beside a parameter, in all."""
    width: int = parameter.shape[-1]
    found = code_of(key)
    return columns(found[2], width)[key.endswith("_scale")] if found else width
