"""zstd around a shard (RFC 8878). What is hashed is what is on the disk."""

from collections.abc import Iterable, Iterator
from typing import Any

from trainkit.errors import UserError

SUFFIX = ".zst"
MOST = 1 << 15  # times its size that a packed file may unpack to: zstd packs nothing but zeros about so well
LEVEL = 1  # numbers hardly pack better at higher ones


def module() -> Any:
    """The zstandard package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise UserError("packed checkpoints need the package zstandard: pip install 'trainkit[data]'") from error
    return zstandard


def pack(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The parts of a file, compressed."""
    compressor = module().ZstdCompressor(level=LEVEL).compressobj()
    for part in parts:
        yield compressor.compress(part)
    yield compressor.flush()


class Unpacked:
    """The bytes inside a compressed file. However much it unpacks to, only what is asked for is ever held."""

    def __init__(self, source: Any, size: int) -> None:
        self._reader = module().ZstdDecompressor().stream_reader(_Bytes(source, size), read_size=1 << 20)

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""
        while view:
            try:
                got = self._reader.readinto(view)
            except module().ZstdError as error:
                raise ValueError(f"a packed shard cannot be unpacked: {error}") from error
            if got == 0:
                raise ValueError("a packed shard ends before it should")
            view = view[got:]


class _Bytes:
    """A source as the file that zstandard reads from."""

    def __init__(self, source: Any, size: int) -> None:
        self._source, self._left = source, size

    def read(self, size: int) -> bytes:
        content = bytearray(min(size, self._left))
        self._left -= len(content)
        self._source.read_into(memoryview(content))
        return bytes(content)
