"""What can be chosen: the groups of `conf/` and their choices, read from the folder alone (no heavy import)."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "conf"
CONF = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "conf"

ANY_OF_SEVERAL = ("memory", "tracking", "profile")  # groups whose choices join with '+'
MAY_BE_NULL = ("experiment", "model.adapter")  # groups of which nothing need be chosen


def choices(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Every group and its choices, sorted; a group within another is dotted (`model.adapter`). `config_dir` adds a person's
    own to the ones that ship."""
    found: dict[str, set[str]] = {}
    for root in (CONF, config_dir):
        if root is None:
            continue
        for file in [*root.glob("*/*.yaml"), *root.glob("*/*/*.yaml")]:
            group = ".".join(file.parent.relative_to(root).parts)
            found.setdefault(group, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}
