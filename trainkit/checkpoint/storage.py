"""An object store or another disk, over fsspec: the few things that are asked of it, and one error for all that fails."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from trainkit.checkpoint.manifest import BadCheckpoint
from trainkit.errors import FAILED, UserError
from trainkit.strict import one_line

TRIES = 2  # of s3fs for one request; whoever calls tries again later
CONNECT_S, READ_S = 5, 60
PART = 32 << 20  # bytes read at once
_PASSWORD = re.compile(r"(?<=://)[^/@]*@")
_S3 = ("s3", "s3a")
_NO_CACHE = {"use_listings_cache": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "local": {"auto_mkdir": True},
    "gs": _NO_CACHE,
    "gcs": _NO_CACHE,
    **{name: {**_NO_CACHE, "max_concurrency": 2} for name in _S3},  # parts of 50 MiB that are in memory at once
}


class RemoteError(RuntimeError):
    """A remote cannot be reached, or did not do what it was asked. Another time it may."""

    exit_code = FAILED


@dataclass(frozen=True)
class Entry:
    """What a listing says of a name. `size` is None for what is no file: a folder, or something else, as a link is."""

    folder: bool
    size: int | None


class Storage:
    """The files below a URL, by their path there. Every call blocks, and raises RemoteError when the remote fails.

    Nothing is asked of the remote before the first call. `url` is without a password.

    Raises:
        UserError: the URL is none, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self._given = url.rstrip("/")
        self.url = _PASSWORD.sub("", self._given)
        self._seen: dict[tuple[str, str], str] = {}  # (path, hash) to what `info` said of the file that has that hash
        protocol, _, place = self._given.partition("://")
        if not place:
            raise UserError(f"'{self.url}' is not the URL of a folder: write it as s3://bucket/folder")
        try:
            import fsspec

            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            raise UserError(f"{self.url} needs a package that is missing: pip install 'trainkit[remote]'") from error
        except ValueError as error:
            raise UserError(
                f"{self.url}: fsspec knows no protocol '{protocol}': try s3://, gs:// or file://"
            ) from error

    def entries(self, path: str) -> dict[str, Entry]:
        """What a folder holds, by name; nothing where there is no such folder."""
        with self._asking("listing"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(path), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            return {entry["name"].rstrip("/").rpartition("/")[2]: _entry(entry) for entry in found}

    def read(self, path: str, size: int) -> Iterator[bytes]:
        """The `size` bytes of a file, in parts.

        Raises:
            BadCheckpoint: they are not there.
        """
        for begin in range(0, size, PART):
            end = min(begin + PART, size)
            try:
                with self._asking("reading"):
                    part = self._fs.cat_file(self._at(path), start=begin, end=end)
            except FileNotFoundError as error:
                raise BadCheckpoint(f"{path.rpartition('/')[2]} is not there any more") from error
            if len(part) != end - begin:
                raise BadCheckpoint(f"{path.rpartition('/')[2]} is cut short")
            yield part

    def holds(self, path: str, facts: Mapping[str, Any]) -> bool:
        """Whether a file has that size and hash. What was read once is not read again while its `info` is the same."""
        try:
            with self._asking("looking at a file"):
                info = self._fs.info(self._at(path))
        except FileNotFoundError:
            return False
        if _entry(info).size != facts["size"]:
            return False
        key, said = (path, facts["xxh3_128"]), repr(sorted(info.items()))
        if self._seen.get(key) != said:
            digest = xxhash.xxh3_128()
            try:
                for part in self.read(path, facts["size"]):
                    digest.update(part)
            except BadCheckpoint:
                return False
            if digest.hexdigest() != facts["xxh3_128"]:
                return False
            self._seen[key] = said
        return True

    def forget(self) -> None:
        """Read again what is asked for next."""
        self._seen.clear()

    def put(self, local: Path, path: str) -> None:
        """Send a file."""
        with self._doing(f"sending {local.name}"):
            self._unlink(path)
            self._fs.put_file(str(local), self._at(path))

    def write(self, path: str, content: bytes) -> None:
        """Send a small file."""
        with self._doing(f"writing {path.rpartition('/')[2]}"):
            self._unlink(path)
            self._fs.pipe_file(self._at(path), content)

    def remove(self, path: str) -> None:
        """Remove a file."""
        with self._doing(f"removing {path.rpartition('/')[2]}"):
            self._fs.rm_file(self._at(path))

    def remove_folder(self, path: str) -> None:
        """Remove a folder with all that it holds; one that is not there is removed already."""
        with contextlib.suppress(FileNotFoundError), self._asking(f"removing {path.rpartition('/')[2]}"):
            self._fs.rm(self._at(path), recursive=True)

    def _unlink(self, path: str) -> None:
        """On a disk, what is written would go through a link, to wherever it leads."""
        if getattr(self._fs, "local_file", False) and self._fs.islink(self._at(path)):
            self._fs.rm_file(self._at(path))

    def _at(self, path: str) -> str:
        return f"{self._opened[1]}/{path}".rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return _open(self._given)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Each library has exceptions of its own: here they become one, but that something is not there."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise RemoteError(one_line(f"{self.url}: {what}: {type(error).__name__}: {error}")) from error

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Where a bucket that is not there is an error as well."""
        try:
            with self._asking(what):
                yield
        except FileNotFoundError as error:
            raise RemoteError(one_line(f"{self.url}: {what}: not found: {error}")) from error


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. What a person chose in fsspec's config or in AWS's variables holds."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    options = {**_OPTIONS.get(protocol, {}), **conf.get(protocol, {})}
    if protocol in _S3:
        limits: dict[str, Any] = {"connect_timeout": CONNECT_S, "read_timeout": READ_S}
        if "AWS_MAX_ATTEMPTS" not in os.environ:
            limits["retries"] = {"mode": "standard", "total_max_attempts": 2}
        options["config_kwargs"] = {**limits, **options.get("config_kwargs", {})}
    fs, base = url_to_fs(url, **{**options, "skip_instance_cache": True})
    if protocol in _S3:
        fs.retries = TRIES
    return fs, base.rstrip("/")


def _entry(info: Mapping[str, Any]) -> Entry:
    real = not info.get("islink")
    is_file = real and info["type"] == "file" and isinstance(info["size"], int)
    return Entry(real and info["type"] == "directory", info["size"] if is_file else None)
