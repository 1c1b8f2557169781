"""The system calls of a save, and what each of them has to be careful about."""

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import xxhash

from trainkit.atomic import sync_folder

_CHUNK = 8 << 20
_NOREPLACE, _AT_FDCWD = 1, -100


class Hashed:
    """A new file, hashed while it is written. It is on the disk when `close` returns.

    An fsync that fails is never tried again: the kernel may have dropped the pages and report success the second time
    (https://lwn.net/Articles/752063). The error goes up and the file is abandoned.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o644)
        self._digest = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`, however little a call takes."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        self._digest.update(view)
        self._size += len(view)
        while view:
            written = os.write(self._descriptor, view[:_CHUNK])
            if written == 0:
                raise OSError(errno.EIO, "the disk took nothing")
            view = view[written:]

    def close(self) -> dict[str, int | str]:
        """Make the content durable, and say its size and hash."""
        os.fsync(self._descriptor)
        self.abandon()
        return {"size": self._size, "xxh3_128": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close without a promise."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write a new file durably from its parts, and say its size and hash.

    Raises:
        OSError: the file is there already, or the disk refuses it.
    """
    file = Hashed(path)
    try:
        for part in parts:
            file.write(part)
        return file.close()
    finally:
        file.abandon()


def read(path: Path, limit: int) -> bytearray:
    """A regular file's content, following no link.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or longer than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        if found.st_size > limit:
            raise ValueError(f"{path.name} has {found.st_size} bytes, at most {limit} were expected")
        content = bytearray(found.st_size)
        view, filled = memoryview(content), 0
        while filled < len(content):
            got = os.readv(descriptor, [view[filled : filled + _CHUNK]])
            if got == 0:
                raise ValueError(f"{path.name} was cut short while it was read")
            filled += got
        return content
    finally:
        os.close(descriptor)


def forget(path: Path) -> None:
    """Drop a file's pages from the cache, so that reading it asks the disk. Where that cannot be done, nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def rename_new(old: Path, new: Path) -> None:
    """Rename a folder to a name that nothing has, durably: when this returns, a power cut does not undo it.

    Raises:
        FileExistsError: something has that name.
    """
    if not _renamed_without_replacing(old, new):
        if new.exists():  # without the flag a folder still never replaces a folder that is not empty
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        os.rename(old, new)
    sync_folder(new.parent)


def _renamed_without_replacing(old: Path, new: Path) -> bool:
    """Linux's renameat2; False where the C library or the file system has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(new))
