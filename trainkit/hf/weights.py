"""Tensors of safetensors files, one at a time, whichever of several files they lie in."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trainkit.errors import UserError
from trainkit.strict import one_line, parse_json, read_file, reason

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those that its index names if it has one.

    Raises:
        UserError: there are none, only pickles, or the index names one that is not there.
    """
    if (folder / INDEX).is_file():
        try:
            index = parse_json(read_file(folder / INDEX, MAX_INDEX), max_bytes=MAX_INDEX)
            names = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(one_line(f"{folder / INDEX} is no index of tensors: {error}")) from error
        for name in names:
            if not isinstance(name, str) or "/" in name or not (folder / name).is_file():
                raise UserError(one_line(f"{folder / INDEX} names {name!r}, and there is no such file"))
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickled = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights in {pickled[0]} only, which could run code when it is read: save them as "
            f"safetensors first, with model.save_pretrained(FOLDER) where you trust it, or give a newer revision"
        )
    raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}")


class Tensors:
    """The tensors of open files by name."""

    def __init__(self, where: dict[str, Any]) -> None:
        self._where = where

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; its numbers are not read."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """A tensor, on the CPU, as it is stored."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


@contextmanager
def opened(folder: Path) -> Iterator[Tensors]:
    """The tensors of a folder's safetensors files.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in files(folder):
            try:
                reading = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                why = reason(error) if isinstance(error, OSError) else str(error)
                raise UserError(one_line(f"{file} cannot be read: {why}")) from error
            where |= dict.fromkeys(reading.keys(), reading)
        yield Tensors(where)
