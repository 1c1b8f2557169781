"""Small files that are there whole or not at all."""

import os
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Replace `path` durably: a crash at any moment leaves the old content or the new.

    Raises:
        OSError: the disk is full or not writable; the old content is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
