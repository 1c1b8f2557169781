"""A file system of its own, whose power can be cut."""

import os
import shutil
import subprocess
from pathlib import Path

MIB = {"ext4": 48, "xfs": 320}  # less than 300 is too little for XFS


class NoDisk(RuntimeError):
    """Why this machine cannot make one."""


class Disk:
    """A file system of `kind` in a file, mounted at `folder`.

    Raises:
        NoDisk: it takes root, the tools of that kind, and a kernel that mounts it.
    """

    def __init__(self, place: Path, kind: str) -> None:
        if os.geteuid() != 0 or shutil.which(f"mkfs.{kind}") is None:
            raise NoDisk(f"a file system to cut the power of takes root and mkfs.{kind}")
        self.image, self.folder, self.kind = place / "image", place / "disk", kind
        self.folder.mkdir(exist_ok=True)
        with self.image.open("wb") as file:
            file.truncate(MIB[kind] << 20)  # which takes no room before it is written
        subprocess.run(
            [f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", self.image], check=True, capture_output=True
        )
        self.mount()

    def mount(self) -> None:
        done = subprocess.run(["mount", "-o", "loop", self.image, self.folder], capture_output=True, text=True)
        if done.returncode:
            raise NoDisk(f"mount does not work here: {done.stderr.strip()}")

    def unmount(self) -> None:
        subprocess.run(["umount", self.folder], check=True)

    def again(self) -> None:
        """What is there when the power is back."""
        self.unmount()
        self.mount()
