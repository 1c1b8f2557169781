"""The versions that trainkit runs on, found without importing them."""

import platform
import sys
from importlib import metadata

from trainkit.errors import UserError

PYTHON, TORCH = (3, 11), (2, 11)


def check() -> None:
    """Refuse a Python or torch that is too old, before anything is imported that would fail in its own words.

    Raises:
        UserError: with what is needed.
    """
    if sys.version_info[:2] < PYTHON:
        raise UserError(f"trainkit needs Python {_dotted(PYTHON)} or newer; this is {platform.python_version()}")
    torch = metadata.version("torch")
    if tuple(int(n) for n in torch.split("+")[0].split(".")[:2]) < TORCH:
        raise UserError(f"trainkit needs torch {_dotted(TORCH)} or newer; this is {torch}: pip install -U torch")


def installed() -> dict[str, str]:
    """What a checkpoint was made with."""
    packages = ("trainkit", "torch", "numpy", "safetensors", "tokenizers")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
