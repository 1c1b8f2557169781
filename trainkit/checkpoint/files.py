"""The system calls of a save, and what each of them has to be careful about.

Large files go around the page cache (O_DIRECT) where the file system lets them: the cores that copy into it, and look for
its pages, are those that training uses.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import xxhash

from trainkit.atomic import sync_folder

_CHUNK = 8 << 20
ALIGNED = 4096  # bytes; no disk asks for more
SMALL = 16 * ALIGNED
_NOREPLACE, _AT_FDCWD = 1, -100
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


class Hashed:
    """A new file, hashed in another thread while it is written. It is on the disk when `close` returns.

    An fsync that fails is never tried again: the kernel may have dropped the pages and report success the second time
    (https://lwn.net/Articles/752063). The error goes up and the file is abandoned.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o644)
        self._digest = xxhash.xxh3_128()
        self._hasher: ThreadPoolExecutor | None = None
        self._hashed: Future[None] | None = None
        self._size = 0
        self._block = _block()
        self._filled = 0
        self._direct = _go_around_the_cache(self._descriptor)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`, which must not change before `close`."""
        view = memoryview(data).cast("B") if not isinstance(data, bytes) else memoryview(data)
        self._size += len(view)
        self._hash(view)
        while view:
            taken = min(len(view), len(self._block) - self._filled)
            self._block[self._filled : self._filled + taken] = view[:taken]
            self._filled, view = self._filled + taken, view[taken:]
            if self._filled == len(self._block):
                self._put()

    def close(self) -> dict[str, int | str]:
        """Make the content durable, and say its size and hash."""
        self._use_the_cache()  # for what is left, which need not be a whole block
        self._put()
        os.fsync(self._descriptor)
        if self._hashed is not None:
            self._hashed.result()
        self.abandon()
        return {"size": self._size, "xxh3_128": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Close without a promise."""
        if self._hasher is not None:
            self._hasher.shutdown()
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def _put(self) -> None:
        """Hand on what is in the block, however little a call takes."""
        view, self._filled = self._block[: self._filled], 0
        while view:
            try:
                written = os.write(self._descriptor, view)
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise
                self._use_the_cache()  # the disk wants other blocks than most
                continue
            if written == 0:
                raise OSError(errno.EIO, "the disk took nothing")
            if self._direct and written % ALIGNED:
                self._use_the_cache()
            elif not self._direct and written == _CHUNK:
                _begin_writeback(self._descriptor)
            view = view[written:]

    def _use_the_cache(self) -> None:
        if self._direct:
            self._direct = False
            _use_the_cache(self._descriptor)

    def _hash(self, view: memoryview) -> None:
        if len(view) < _CHUNK and self._hasher is None:
            self._digest.update(view)
            return
        if self._hasher is None:
            self._hasher = ThreadPoolExecutor(1)
        if self._hashed is not None:
            self._hashed.result()  # at most one tensor behind
        self._hashed = self._hasher.submit(self._digest.update, view)


class Reading:
    """A regular file, hashed while it is read, that follows no link and is not longer than `limit` bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or has another size than `size`, or ends before it should.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._name, self._left = path.name, size
        self._digest = xxhash.xxh3_128()
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            os.close(self._descriptor)
            raise ValueError(f"{path.name} is not a regular file of {size} bytes")

    def __enter__(self) -> "Reading":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""
        if len(view) > self._left:
            raise ValueError(f"{self._name} ends before it should")
        self._left -= len(view)
        while view:
            got = os.readv(self._descriptor, [view[:_CHUNK]])
            if got == 0:
                raise ValueError(f"{self._name} was cut short while it was read")
            self._digest.update(view[:got])
            view = view[got:]

    def rest(self) -> str:
        """Read what is left, and give the hash of all."""
        return self._rest(_block() if self._left else memoryview(b""))

    def _rest(self, scratch: memoryview) -> str:
        while self._left:
            self.read_into(scratch[: min(self._left, len(scratch))])
        return self._digest.hexdigest()

    def whole(self) -> str:
        """Read all of it, from the disk itself where that can be done, and give the hash."""
        scratch = _block()
        direct = around = self._left >= _CHUNK and _go_around_the_cache(self._descriptor)
        while direct and self._left:
            try:
                got = min(os.readv(self._descriptor, [scratch]), self._left)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break
            self._digest.update(scratch[:got])
            self._left -= got
            direct = got > 0 and got % ALIGNED == 0
        if around:
            _use_the_cache(self._descriptor)
        return self._rest(scratch)


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


def read(path: Path, limit: int) -> bytes:
    """A small file's content, as `Reading` reads it, of at most `limit` bytes."""
    size = path.lstat().st_size
    if size > limit:
        raise ValueError(f"{path.name} has {size} bytes, at most {limit} were expected")
    content = bytearray(size)
    with Reading(path, size) as file:
        file.read_into(memoryview(content))
    return bytes(content)


def hash_of(path: Path, size: int) -> str:
    """The hash of a file of that size. Raises what `Reading` does."""
    with Reading(path, size) as file:
        return file.whole()


def forget(path: Path) -> None:
    """Drop a file's pages from the cache, so that reading it asks the disk. Where that cannot be done, nothing."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _block() -> memoryview:
    """Memory whose address the disk can read from and write to; little of it where the process may not have more."""
    try:
        return memoryview(mmap.mmap(-1, _CHUNK))
    except OSError:
        return memoryview(mmap.mmap(-1, min(_CHUNK, SMALL)))


def _go_around_the_cache(descriptor: int) -> bool:
    """From here on blocks whose place in the file, address and size are multiples of ALIGNED go to or come from the disk
    itself; whether the file system can do that."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def _use_the_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _begin_writeback(descriptor: int) -> None:
    """Let the disk begin with what is written, so that the fsync at the end finds little to do. A wish: where it cannot
    be heard nothing is lost."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


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
    if not hasattr(_libc, "renameat2"):
        return False
    if _libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number), str(new))
