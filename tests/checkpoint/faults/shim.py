"""The library that makes system calls fail, built from shim.c."""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path, source: Path = HERE / "shim.c") -> Path | None:
    """Where it was built; None where that cannot be done: it takes Linux and a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / f"{source.stem}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library
