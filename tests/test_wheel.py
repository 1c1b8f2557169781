"""The wheel is enough: configs, corpus and all, without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from trainkit.choices import CONF


def test_a_wheel_works_without_the_checkout(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="needs hatchling to build a wheel")
    project = CONF.parent
    if not (project / "pyproject.toml").exists():
        pytest.skip("runs in a checkout only")
    built = tmp_path / "built"
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    wheel = next(built.glob("trainkit-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    assert sum(name.startswith("trainkit/conf/") for name in names) == sum(1 for _ in CONF.rglob("*.yaml"))
    assert "trainkit/data/corpora/moby-dick.jsonl.gz" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    code = (
        "import trainkit, sys; assert 'site' in trainkit.__file__\n"
        "from trainkit.cli import main\n"
        "main(['train', 'steps=3', 'schedule.warmup=1', 'data.length=16', 'data.batch=2', 'model.width=8', "
        "'evaluation.batches=2', 'evaluation.sample_tokens=3'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "step 3/3" in found.stdout
