"""`@config`: what every config dataclass in the house is: frozen, keyword-only, deaf to unknown keys.

Bounds are `annotated_types`, which pydantic enforces when `run.py` types a run; nothing here imports it.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, dataclass_transform

from annotated_types import Ge, Gt, Interval

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
T = TypeVar("T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: T) -> T:
    """Make `cls` a config: a frozen, keyword-only dataclass that refuses keys it does not have."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]  # where pydantic looks for it
    return dataclass(frozen=True, kw_only=True)(cls)  # type: ignore[return-value]  # the same class


def how(default: Any) -> Any:
    """A field that says how a run is done inside a group that says what is learned: free to change on resume."""
    return field(default=default, metadata={"how": True})
