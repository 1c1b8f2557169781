"""The rules of the house, as tests: floors, size, one-to-one groups, who knows what."""

import ast
import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainkit
from trainkit import run as runs
from trainkit.choices import ANY_OF_SEVERAL, CONF, choices
from trainkit.errors import UserError

ROOT = Path(trainkit.__file__).parent
FLOORS = [
    {"config", "errors", "units", "choices", "atomic"},
    {
        "models",
        "data",
        "optimizers",
        "schedules",
        "precision",
        "memory",
        "parallel",
        "evaluation",
        "tracking",
        "hardware",
        "randomness",
        "signals",
        "throughput",
        "progress",
        "overrides",
        "versions",
    },
    {"tasks", "checkpoint"},
    {"learner"},
    {"trainer"},
    {"run"},
    {"build", "launch", "use", "show", "doctor", "sampling", "prepare"},
    {"cli", "__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
NEIGHBOURS = {6: True, 7: True}  # the upper floors may import sideways; the rooms below may not
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]
EVERY_PYTHON_FILE = [
    p for d in (ROOT, CONF.parent / "tests", CONF.parent / "benchmarks") for p in sorted(d.rglob("*.py"))
]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            bare = node.module == "trainkit"
            yield from (f"trainkit.{a.name}" for a in node.names) if bare else [node.module]
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT.parent))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_only_go_down(path: Path) -> None:
    for module in imports(path):
        if not module.startswith("trainkit."):
            continue
        other = module.split(".")[1]
        if other in ("__version__", "__main__", room(path)):
            continue
        down = FLOOR[other] < FLOOR[room(path)]
        sideways = FLOOR[other] == FLOOR[room(path)] and NEIGHBOURS.get(FLOOR[other], False)
        assert down or sideways, f"{room(path)} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_run_knows_the_config_tools(path: Path) -> None:
    if path.name != "run.py":
        assert not {m.split(".")[0] for m in imports(path)} & {"hydra", "omegaconf", "pydantic"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_unpickles(path: Path) -> None:
    modules = {m.split(".")[0] for m in imports(path)}
    assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "np.load", "yaml.load", "eval", "exec"}


@pytest.mark.parametrize("path", EVERY_PYTHON_FILE, ids=name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_error_is_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            nothing = all(isinstance(s, ast.Pass) or ast.unparse(s) == "..." for s in node.body)
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (nothing and broad), f"{path}:{node.lineno}"


def test_every_floor_has_its_rooms() -> None:
    assert {room(p) for p in FILES} == set(FLOOR)


def test_every_group_is_a_field_of_run_and_back() -> None:
    groups = {f.name for f in dataclasses.fields(runs.Run)} - {"name", "seed", "steps", "clip", "stop_at", "compile"}
    assert set(choices()) - {"experiment"} == groups
    rooms = {"model": "models", "optimizer": "optimizers", "task": "tasks", "schedule": "schedules"}
    assert {rooms.get(g, g) for g in groups} <= set(FLOOR)


def every_choice() -> list[str]:
    return [f"{group}={c}" for group, found in choices().items() for c in found]


NEEDS = {
    "data=text": ["data.path=README.md"],
    "data=shards": ["data.path=anywhere"],
    "data=mixture": ["data.sources.a.path=a", "data.sources.b.path=b"],
}


@pytest.mark.parametrize("choice", every_choice())
def test_every_choice_composes(choice: str) -> None:
    run = runs.composed([choice, *NEEDS.get(choice, [])])
    again = runs.saved(run.yaml())
    assert again == run
    assert not again.differs(run)


def test_yaml_holds_values_only() -> None:
    for file in CONF.rglob("*.yaml"):
        assert "_target_" not in file.read_text()


def test_a_group_of_several_takes_any_of_them_joined() -> None:
    for group in ANY_OF_SEVERAL:
        every = choices()[group]
        joined = runs.composed([f"{group}={'+'.join(every)}"])
        assert runs.composed([f"{group}=[{','.join(reversed(every))}]"]) == joined


def test_the_wheel_ships_what_the_checkout_has() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"conf": "trainkit/conf"}


def test_a_person_brings_choices_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text((CONF / "model" / "tiny.yaml").read_text())
    assert runs.composed(["model=mine"], tmp_path).model == runs.composed(["model=tiny"]).model
    with pytest.raises(UserError, match="model has no choice 'mine'"):
        runs.composed(["model=mine"])
