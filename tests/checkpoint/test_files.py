"""Large files go around the page cache, block by block, whatever the disk makes of it."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from trainkit.checkpoint import files

BLOCK = 3 * files.ALIGNED
SIZES = [0, 1, files.ALIGNED, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + files.ALIGNED, 5 * BLOCK + 777]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", BLOCK)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def parts(data: bytes) -> Iterator[bytes]:
    """Of many sizes, so that none of them is a block."""
    draw, begin = random.Random(1), 0
    while begin < len(data):
        end = begin + draw.choice([1, 100, files.ALIGNED, BLOCK, 2 * BLOCK + 5])
        yield data[begin:end]
        begin = end


def written(path: Path, size: int) -> None:
    data = content(size)
    facts = files.write(path, parts(data))
    assert facts == {"size": size, "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    assert path.read_bytes() == data
    assert files.hash_of(path, size) == facts["xxh3_128"]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_there(tmp_path: Path, size: int) -> None:
    written(tmp_path / "file", size)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no file system in memory here")
def test_in_memory_too(tmp_path: Path) -> None:
    path = Path(f"/dev/shm/trainkit-test-{os.getpid()}")
    try:
        written(path, SIZES[-1])
    finally:
        path.unlink()


def test_blocks_go_around_the_cache_and_the_rest_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    able = files._go_around_the_cache(probe)
    os.close(probe)
    if not able:
        pytest.skip("this file system has no O_DIRECT")
    seen: list[tuple[str, bool]] = []
    write, readv, fcntl = os.write, os.readv, files.fcntl.fcntl

    def around(descriptor: int) -> bool:
        return bool(fcntl(descriptor, files.fcntl.F_GETFL) & os.O_DIRECT)

    monkeypatch.setattr(os, "write", lambda fd, view: (seen.append(("write", around(fd))), write(fd, view))[1])
    monkeypatch.setattr(os, "readv", lambda fd, views: (seen.append(("read", around(fd))), readv(fd, views))[1])
    written(tmp_path / "file", 2 * BLOCK + 100)
    assert seen == [("write", True), ("write", True), ("write", False), *[("read", True)] * 3]


@pytest.mark.parametrize("taken", [1, 100, files.ALIGNED, files.ALIGNED + 1])
def test_a_disk_that_takes_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """A write around the cache cannot go on in the middle of a block of the disk."""
    real, fcntl, calls = os.write, files.fcntl.fcntl, [0]

    def little(descriptor: int, view: memoryview) -> int:
        calls[0] += 1
        if calls[0] % 2 or len(view) <= taken:
            return real(descriptor, view)
        flags = fcntl(descriptor, files.fcntl.F_GETFL)
        files._use_the_cache(descriptor)
        done = real(descriptor, view[:taken])
        fcntl(descriptor, files.fcntl.F_SETFL, flags)
        return done

    monkeypatch.setattr(os, "write", little)
    written(tmp_path / "file", SIZES[-1])


@pytest.mark.parametrize("call", ["write", "readv"])
def test_a_disk_that_wants_other_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real, fcntl = getattr(os, call), files.fcntl.fcntl

    def picky(descriptor: int, *what: object) -> int:
        if fcntl(descriptor, files.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(descriptor, *what))

    monkeypatch.setattr(os, call, picky)
    written(tmp_path / "file", SIZES[-1])


def test_a_disk_that_gives_little_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read around the cache cannot go on in the middle of a block of the disk either."""
    real, fcntl, calls = os.readv, files.fcntl.fcntl, [0]

    def little(descriptor: int, views: list[memoryview]) -> int:
        calls[0] += 1
        if calls[0] > 1:
            return real(descriptor, views)
        flags = fcntl(descriptor, files.fcntl.F_GETFL)
        files._use_the_cache(descriptor)
        got = real(descriptor, [views[0][:100]])
        fcntl(descriptor, files.fcntl.F_SETFL, flags)
        return got

    monkeypatch.setattr(os, "readv", little)
    written(tmp_path / "file", SIZES[-1])
    assert calls[0] > 2


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content(3 * BLOCK))
    with files.Reading(path, 3 * BLOCK) as reading:
        os.truncate(path, 2 * BLOCK)
        with pytest.raises(ValueError, match="cut short"):
            reading.whole()
