"""Optimizer states of 8 or 4 bits in place of 32 (Dettmers et al. 2022, arXiv:2110.02861; Li et al. 2023,
arXiv:2309.01507). What they are is `optimizers/formats.py`; here is which.

Grade: approximate. docs/benchmarks/memory.md has the loss beside that of float32 states.
"""

from typing import Any, ClassVar, Literal

from trainkit.config import config


@config
class LowBitStates:
    """States of matrices as `int8` or `int4` codes, or as `fp8` (e4m3) numbers, with a scale for every 128 of a row.
    Tensors of less than 4096 numbers, and those of one dimension, keep float32. Bytes a parameter, of AdamW: 2.06, 1.06 and
    2.06, in place of 8."""

    grade: ClassVar[str] = "approximate"
    format: Literal["int8", "int4", "fp8"]

    @property
    def said(self) -> str:
        """What it is, for a person."""
        return {"int8": "8bit", "int4": "4bit", "fp8": "fp8"}[self.format]

    def check(self, *, optimizer: Any, **_: Any) -> None:
        """Raise ValueError where there is nothing to shrink."""
        if optimizer.kind == "sgd" and optimizer.momentum == 0:
            raise ValueError("memory.states has no states to shrink in optimizer=sgd with optimizer.momentum=0")
