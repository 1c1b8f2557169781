"""Checkpoints on an object store or another disk: what is put there, and what is believed of it.

URL/RUN/run.yaml                       for people
URL/RUN/checkpoints/step-0000001000/   the files of a local checkpoint, manifest.json last

A folder there whose manifest is not valid, or lists a file that is not there in its size, does not exist. Anyone may
have written what a remote holds: only names that trainkit gives are looked at, no link is followed, no file is read
beyond the size that both its listing and the manifest say, and nothing counts before its hash is right.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from trainkit.atomic import sync_folder
from trainkit.checkpoint import files, store
from trainkit.checkpoint import manifest as manifests
from trainkit.checkpoint.manifest import BadCheckpoint, Manifest
from trainkit.checkpoint.storage import Entry, RemoteError, Storage
from trainkit.errors import DamagedError, UserError
from trainkit.units import human_bytes

CONFIG = "run.yaml"
MAX_CONFIG = 1 << 20  # bytes
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


class Remote:
    """The runs below a URL. Every call blocks, and raises RemoteError when the remote fails and UserError for a run's
    name that is none. `url` is for people, without a password.

    Raises:
        UserError: the URL is none, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self._storage = Storage(url)
        self.url = self._storage.url

    def upload(self, folder: Path) -> Manifest:
        """Put a committed checkpoint there. What an earlier try left there whole is not sent again, and a checkpoint that
        is there already is taken as it is.

        Raises:
            BadCheckpoint: the local one is not whole.
        """
        manifest = store.inspect(folder)
        run, raw = folder.absolute().parents[1].name, manifest.encode()
        at = _at(run, manifest.step)
        there = self._storage.entries(at)
        if self._is_there(at, there, manifest.step, raw):
            self._storage.forget()
            return manifest
        if manifests.NAME in there:  # it does not belong to what is written now
            self._storage.remove(f"{at}/{manifests.NAME}")
        for name, facts in manifest.files.items():
            if name not in there or not self._storage.holds(f"{at}/{name}", facts):
                self._put(folder / name, f"{at}/{name}", facts)
        config = manifest.files.get(CONFIG)
        if config is not None and not self._storage.holds(f"{run}/{CONFIG}", config):
            self._put(folder / CONFIG, f"{run}/{CONFIG}", config)
        self._storage.write(f"{at}/{manifests.NAME}", raw)
        if not self._is_there(at, self._storage.entries(at), manifest.step, raw):
            raise RemoteError(f"{self.url}: step {manifest.step} is not there as it was sent")
        self._storage.forget()
        return manifest

    def runs(self) -> list[str]:
        """The runs that have a whole checkpoint there."""
        named = [name for name, entry in self._storage.entries("").items() if entry.folder and _RUN.fullmatch(name)]
        return sorted(name for name in named if self.newest(name) is not None)

    def steps(self, run: str) -> list[int]:
        """The steps that have a folder there, whole or not."""
        found = self._storage.entries(f"{_named(run)}/{store.FOLDER}")
        steps = [(name, store.step_of(name)) for name, entry in found.items() if entry.folder]
        # digits of other scripts are digits to a regex and no name of ours
        return sorted(step for name, step in steps if step is not None and store.step_name(step) == name)

    def checkpoints(self, run: str) -> dict[int, Manifest]:
        """The whole checkpoints there, by step."""
        return dict(reversed([(manifest.step, manifest) for manifest in self._whole(run)]))

    def newest(self, run: str) -> int | None:
        """The step of the newest whole checkpoint there."""
        return next((manifest.step for manifest in self._whole(run)), None)

    def config(self, run: str, step: int | None = None) -> str | None:
        """The verified `run.yaml` in the newest checkpoint there (or in that of `step`) that has one."""
        for manifest in self._whole(run):
            facts = manifest.files.get(CONFIG)
            if facts is None or facts["size"] > MAX_CONFIG or step not in (None, manifest.step):
                continue
            with contextlib.suppress(BadCheckpoint, UnicodeDecodeError):
                content = b"".join(self._storage.read(f"{_at(run, manifest.step)}/{CONFIG}", facts["size"]))
                if xxhash.xxh3_128_hexdigest(content) == facts["xxh3_128"]:
                    return content.decode()
        return None

    def download(self, run: str, step: int | None, into: Path, note: Callable[[str], None]) -> Path:
        """Fetch the checkpoint of `step`, or the newest good one, into the folder `into`, as durably as it is saved; a
        damaged newer one is said to `note`. One that is good in `into` already is taken from there.

        Raises:
            UserError: there is none, or no room for it here.
            DamagedError: what is there is damaged.
            OSError: the local disk refuses it.
        """
        bad = []
        for its in [step] if step is not None else reversed(self.steps(run)):
            at = _at(run, its)
            try:
                found = self._manifest(at, self._storage.entries(at), its)
                if found is not None:
                    return self._fetch(at, *found, into)
            except BadCheckpoint as error:
                bad.append(f"{store.step_name(its)}: {error}")
                note(f"warning: {self.url}/{run}/{store.FOLDER}/{bad[-1]}")
        if bad:
            raise DamagedError(f"no checkpoint that was asked for in {self.url}/{run} is good: {'; '.join(bad)}")
        raise UserError(f"{self.url}/{run} has no whole checkpoint{'' if step is None else f' of step {step}'}")

    def remove(self, run: str, step: int) -> None:
        """Remove a checkpoint, its manifest first, so that half of one is never found."""
        at = _at(run, step)
        if manifests.NAME in self._storage.entries(at):
            self._storage.remove(f"{at}/{manifests.NAME}")
        self._storage.remove_folder(at)

    def _whole(self, run: str) -> Iterator[Manifest]:
        """The whole checkpoints there, newest first."""
        for step in reversed(self.steps(run)):
            at = _at(run, step)
            with contextlib.suppress(BadCheckpoint):
                found = self._manifest(at, self._storage.entries(at), step)
                if found is not None:
                    yield found[0]

    def _manifest(self, at: str, there: Mapping[str, Entry], step: int) -> tuple[Manifest, bytes] | None:
        """The manifest of a folder that holds `there`, and its bytes; None where it has none.

        Raises:
            BadCheckpoint: it is not valid, or not all of it is there.
        """
        sizes = {name: entry.size for name, entry in there.items()}
        size = sizes.get(manifests.NAME)
        if size is None:
            return None
        if size > manifests.MAX_BYTES:
            raise BadCheckpoint(f"{manifests.NAME} has {size} bytes")
        raw = b"".join(self._storage.read(f"{at}/{manifests.NAME}", size))
        manifest = manifests.decode(raw)
        if manifest.step != step:
            raise BadCheckpoint(f"it says that it is step {manifest.step}")
        for name, facts in manifest.files.items():
            if sizes.get(name) != facts["size"]:
                raise BadCheckpoint(f"{name} is missing or has another size")
        return manifest, raw

    def _is_there(self, at: str, there: Mapping[str, Entry], step: int, raw: bytes) -> bool:
        """Whether a folder has that very manifest, and all that it lists."""
        try:
            found = self._manifest(at, there, step)
        except BadCheckpoint:
            return False
        return found is not None and found[1] == raw

    def _put(self, local: Path, path: str, facts: Mapping[str, Any]) -> None:
        self._storage.put(local, path)
        if not self._storage.holds(path, facts):
            store.verify(local.parent)  # when it is the disk that is wrong, sending it again is of no use
            raise RemoteError(f"{self.url}: {local.name} did not arrive as it was sent")

    def _fetch(self, at: str, manifest: Manifest, raw: bytes, into: Path) -> Path:
        name = store.step_name(manifest.step)
        final, hidden = into / name, into / f"{store.PARTIAL}{name}-{os.getpid()}"
        if final.exists():
            with contextlib.suppress(BadCheckpoint):
                store.verify(final)
                return final
            _set_aside(final)
        into.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(into).free) < manifest.size:
            raise UserError(f"{into} has {human_bytes(free)} free, and {name} takes {human_bytes(manifest.size)}")
        shutil.rmtree(hidden, ignore_errors=True)
        partial = hidden / name  # by this name it can be verified before it is seen
        partial.mkdir(parents=True)
        try:
            for file, facts in manifest.files.items():
                written = files.write(partial / file, self._storage.read(f"{at}/{file}", facts["size"]))
                if written["xxh3_128"] != facts["xxh3_128"]:
                    raise BadCheckpoint(f"{file} is not what was saved: its hash differs")
                files.forget(partial / file)
            files.write(partial / manifests.NAME, [raw])
            sync_folder(partial)
            store.verify(partial)
            files.rename_new(partial, final)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        return final


def _named(run: str) -> str:
    if not _RUN.fullmatch(run):
        raise UserError(f"{run!r} is no name of a run")
    return run


def _at(run: str, step: int) -> str:
    return f"{_named(run)}/{store.FOLDER}/{store.step_name(step)}"


def _set_aside(path: Path) -> None:
    aside, number = path.with_name(f"{store.BAD}{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{store.BAD}{path.name}.{number}")
    path.rename(aside)
    sync_folder(path.parent)
