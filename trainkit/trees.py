"""Configs as trees of plain values, and values by dotted key."""

from dataclasses import fields
from typing import Any


def what(config_: Any) -> dict[str, Any]:
    """`asdict` without the fields that say how."""
    kept = {}
    for f in fields(config_):
        value = getattr(config_, f.name)
        if "how" not in f.metadata:
            kept[f.name] = what(value) if hasattr(value, "__dataclass_fields__") else _plain(value)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return what(value)
    return list(value) if isinstance(value, tuple) else value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def get(tree: Any, dotted: str) -> Any:
    """What stands under a dotted key; KeyError where nothing does."""
    for key in dotted.split("."):
        tree = tree[key]
    return tree


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Write under a dotted key, in place, making what lacks on the way."""
    *parents, last = dotted.split(".")
    for key in parents:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
    tree[last] = value
