"""The scripts that start runs, with a stand-in for trainkit that writes down what it was given, and for a cluster's own."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from trainkit import torchrun
from trainkit.torchrun import Launch

SCRIPTS = Path(__file__).parents[1] / "scripts"
WORDS = ["model=M1B", "data.path=/a folder", "parallel=fsdp"]


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """The file of words, one a line, after `trainkit`, `srun` and `scontrol` are stand-ins in PATH."""
    folder, file = tmp_path / "bin", tmp_path / "given"
    folder.mkdir()
    for name, body in {
        "trainkit": f'printf "%s\\n" "$@" > {file}',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": 'echo "node7"; echo "node8"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return file


def launched(given: Path, script: str, *words: str, **environment: str) -> tuple[Launch | None, list[str]]:
    path = f"{given.parent / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [SCRIPTS / script, *words], env={**environment, "PATH": path, "HOME": str(given.parent)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    verb, *rest = given.read_text().splitlines()
    assert verb == "train"
    return torchrun.asked(rest)


def test_one_machine(given: Path) -> None:
    assert launched(given, "multi_gpu.sh", *WORDS) == (Launch(nproc=None, restarts=3), ["parallel=auto", *WORDS])
    assert launched(given, "multi_gpu.sh", *WORDS, NPROC="2", RESTARTS="0")[0] == Launch(nproc=2)


def test_several_machines(given: Path) -> None:
    found, rest = launched(given, "multi_node.sh", *WORDS, NODES="1:2", RENDEZVOUS="node0:29400", ADDRESS="10.0.0.1")
    assert found == Launch(nproc=None, restarts=3, nodes=(1, 2), rendezvous="node0:29400", address="10.0.0.1")
    assert rest == ["parallel=auto", *WORDS]
    assert launched(given, "multi_node.sh", NODES="2", RENDEZVOUS="a:1")[0] == Launch(
        nproc=None, restarts=3, nodes=(2, 2), rendezvous="a:1"
    )
    silent = subprocess.run([SCRIPTS / "multi_node.sh"], capture_output=True, text=True, env={"RENDEZVOUS": "a:1"})
    assert silent.returncode != 0
    assert "how many machines" in silent.stderr


def test_slurm(given: Path) -> None:
    assert launched(given, "slurm.sbatch", *WORDS) == (None, ["guard.deadline_s=110", *WORDS])
    one, _ = launched(given, "slurm.sbatch", *WORDS, SLURM_GPUS_ON_NODE="8")
    assert one == Launch(nproc=8)
    several, rest = launched(
        given, "slurm.sbatch", *WORDS, SLURM_GPUS_ON_NODE="8", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[7-8]"
    )
    assert several == Launch(nproc=8, nodes=(2, 2), rendezvous="node7:29400")
    assert rest == ["guard.deadline_s=110", "parallel=auto", *WORDS]


def test_a_later_choice_of_a_group_counts() -> None:
    """The scripts say parallel=auto before a person's words."""
    from trainkit import run as runs

    assert runs.composed(["name=x", "parallel=auto", "parallel=fsdp"]).parallel.kind == "fsdp"


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_skypilot(given: Path, nodes: str) -> None:
    task = yaml.safe_load((SCRIPTS / "sky.yaml").read_text())
    assert set(task) == {"name", "resources", "num_nodes", "envs", "workdir", "setup", "run"}
    environment = {**task["envs"], "WORDS": "model=M1B parallel=fsdp", "NAME": "m1b", "SKYPILOT_NUM_NODES": nodes}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "HOME": str(given.parent)}
    path = f"{given.parent / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", task["run"]], env={**environment, "PATH": path}, cwd=SCRIPTS.parent, check=True)
    verb, *rest = given.read_text().splitlines()
    found, others = torchrun.asked(rest)
    assert (verb, others) == ("train", ["name=m1b", "guard.deadline_s=110", "model=M1B", "parallel=fsdp"])
    several = {"nodes": (2, 2), "rendezvous": "10.0.0.1:29400"} if nodes == "2" else {}
    assert found == Launch(nproc=None, restarts=3, **several)  # type: ignore[arg-type]
