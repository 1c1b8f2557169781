"""A place for a checkpoint's numbers that keeps only their codes, so that float32 states that are to become states of few
bits are never all there at once."""

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizers import formats, sharded
from trainkit.optimizers.formats import CODES, SIGNED


class Coded:
    """As much of a tensor, of a matrix `parameter`'s shape, as reading a checkpoint needs. Whole rows can be copied into
    it. `state` is what became of them: codes and scales, laid out as the parameter."""

    def __init__(self, parameter: Tensor, moment: str, format_: str, dtype: torch.dtype, device: torch.device) -> None:
        here = sharded.local(parameter.detach())
        code = CODES[format_][SIGNED[moment]]
        parts = formats.empty(code, torch.empty(here.shape, device="meta"), device)
        last = formats.columns(code, parameter.shape[-1])
        self.shape, self.ndim, self.dtype, self.device = parameter.shape, parameter.ndim, dtype, device
        self.state = {
            f"{moment}_{format_}{end}": sharded.beside(parameter, part, columns)
            for end, part, columns in zip(("", "_scale"), parts, last, strict=True)
        }
        self._parts, self._code = parts, code
        if hasattr(parameter, "to_local"):
            self.to_local = lambda: self
            self.__create_chunk_list__ = parameter.__create_chunk_list__  # type: ignore[attr-defined]  # a DTensor has it

    def detach(self) -> "Coded":
        return self

    def __getitem__(self, place: tuple[slice, ...]) -> "_Rows":
        rows, _ = place
        return _Rows(self, rows)

    def put(self, rows: slice, numbers: Tensor) -> None:
        """Keep the codes of these rows."""
        codes, scales = self._parts
        formats.quantize(numbers.to(self.device), self._code, into=(codes[rows], scales[rows]))


class _Rows:
    """Some rows of a place."""

    def __init__(self, place: Coded, rows: slice) -> None:
        self._place, self._rows = place, rows
        self.dtype, self.device = place.dtype, place.device
        self.shape = (rows.stop - rows.start, *place.shape[1:])

    def is_contiguous(self) -> bool:
        """There is no memory to read into."""
        return False

    def copy_(self, numbers: Any) -> None:
        self._place.put(self._rows, numbers)


def coded(
    optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, dtype: torch.dtype, device: torch.device
) -> Coded | None:
    """A place for the numbers of a state that `optimizer` keeps in few bits; None where it keeps numbers, or the rows do
    not lie here whole."""
    format_ = sharded.format_of(optimizer, parameter)
    whole = parameter.ndim == 2 and sharded.local(parameter).shape[-1] == parameter.shape[-1]
    return Coded(parameter, key, format_, dtype, device) if format_ and key in SIGNED and whole else None
