"""The rules of the house, as tests: floors, size, one-to-one groups, who knows what."""

import ast
import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainkit
from trainkit import run as runs
from trainkit.choices import CONF, choices

ROOT = Path(trainkit.__file__).parent
FLOORS = [
    {"config", "trees", "errors", "units", "choices", "atomic", "strict", "fingerprint", "slices", "stalls"},
    {
        "models",
        "data",
        "hf",
        "optimizers",
        "schedules",
        "precision",
        "memory",
        "parallel",
        "evaluation",
        "exact",
        "guard",
        "spikes",
        "watchdog",
        "notify",
        "tracking",
        "profile",
        "hardware",
        "speed",
        "randomness",
        "signals",
        "throughput",
        "logs",
        "progress",
        "overrides",
        "versions",
    },
    {"tasks", "checkpoint", "history", "fitting", "states"},
    {"learner"},
    {"replay", "saves"},
    {"trainer"},
    {"run"},
    {
        "benchmark",
        "build",
        "spread",
        "header",
        "checkpoints",
        "convert",
        "unpickle",
        "launch",
        "torchrun",
        "agreement",
        "agent",
        "rendezvous",
        "use",
        "show",
        "doctor",
        "sampling",
        "say",
        "embed",
        "export_vectors",
        "mteb_eval",
        "floors",
        "prepare",
        "merge",
        "imports",
        "opened",
        "export",
        "plan",
        "start",
    },
    {"cli", "cli_checkpoint", "cli_options", "__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
NEIGHBOURS = {7: True, 8: True}  # the upper floors may import sideways; the rooms below may not
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


UNPICKLE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTE = {
    *("eval", "exec", "builtins.eval", "builtins.exec"),
    *("torch.load", "torch.save", "torch.serialization", "numpy.load"),
    *(f"yaml.{way}{all_}" for way in ("load", "full_load", "unsafe_load") for all_ in ("", "_all")),
    *(f"yaml.{c}{kind}Loader" for c in ("", "C") for kind in ("", "Full", "Unsafe")),
}
PICKLING = {"all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"} | {
    "send_object_list",
    "recv_object_list",
}
CONVERTER = (
    "trainkit/unpickle.py"  # reads what other tools wrote, in a process of its own, and finds no class but tensors
)


def executes(tree: ast.AST, where: str = "") -> Iterator[str]:
    """What in a module could run what it reads. Names are followed through `import ... as`; a mention is enough."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {a.asname: a.name for a in node.names if a.asname}
            yield from (a.name for a in node.names if a.name.split(".")[0] in UNPICKLE or a.name in EXECUTE)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            full = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            if node.module.split(".")[0] in UNPICKLE or node.module in EXECUTE:
                yield node.module
            yield from (f for f in full.values() if f in EXECUTE or f.rpartition(".")[2] in PICKLING)
    safe = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            weights = keywords.get("weights_only")
            if where == CONVERTER and isinstance(weights, ast.Constant) and weights.value is True:
                safe.add(node.func)
            may = keywords.get("allow_pickle")
            if may is not None and not (isinstance(may, ast.Constant) and may.value is False):
                yield "allow_pickle"
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if ast.unparse(node.func).endswith("import_module") or ast.unparse(node.func) == "__import__":
                yield from [str(first)] if str(first).split(".")[0] in UNPICKLE else []
        if isinstance(node, ast.Attribute) and node.attr in PICKLING:
            yield node.attr
        if isinstance(node, ast.Name | ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            dotted = bound.get(head, head) + (f".{rest}" if rest else "")
            dotted = f"numpy{dotted[2:]}" if dotted.startswith("np.") else dotted
            if dotted in EXECUTE and not (node in safe and dotted == "torch.load"):
                yield dotted


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_that_is_read_is_executed(path: Path) -> None:
    may = {"pickle"} if name(path) == CONVERTER else set()
    assert not set(executes(ast.parse(path.read_text()), name(path))) - may


@pytest.mark.parametrize(
    "code",
    [
        *(
            "import pickle",
            "import pickle as p",
            "from pickle import loads",
            "from dill import *",
            "import joblib.numpy",
        ),
        *("import cloudpickle", "import marshal", "def f():\n import shelve", "__import__('pickle')"),
        *("import importlib\nimportlib.import_module('marshal')", "torch.load('x')", "torch.save(x, 'y')"),
        *(
            "import torch as t\nt.load('x')",
            "from torch import load as l",
            "f = torch.load",
            "torch.load(x, weights_only=True)",
        ),
        *("import yaml\nyaml.load(x, Loader=yaml.SafeLoader)", "yaml.unsafe_load(x)", "yaml.full_load(x)"),
        *("from yaml import load", "yaml.parse(x, Loader=yaml.UnsafeLoader)", "eval('1')", "exec('1')", "map(eval, x)"),
        *("import builtins\nbuiltins.exec('1')", "np.load('x')", "import numpy as n\nn.load('x', allow_pickle=True)"),
        *(
            "read_array(f, allow_pickle=maybe)",
            "dist.all_gather_object(a, b)",
            "torch.distributed.broadcast_object_list(x)",
        ),
        *("dist.gather_object(x)", "from torch.distributed import scatter_object_list"),
    ],
)
def test_what_could_execute_is_seen(code: str) -> None:
    assert list(executes(ast.parse(code)))


def test_what_only_looks_like_it_is_let_by() -> None:
    fine = (
        "model.eval()\nblock.load(x)\nyaml.safe_load(x)\njson.load(f)\nread_array(f, allow_pickle=False)\nimport torch"
    )
    assert not list(executes(ast.parse(fine)))
    weights = ast.parse("torch.load(x, weights_only=True)")
    assert not list(executes(weights, CONVERTER))
    for more in (
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.save(x, y)",
        "import pickle",
        "yaml.load(x, weights_only=True)",
    ):
        assert list(executes(ast.parse(more), CONVERTER))


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
    groups -= {"deterministic", "notify", "start_from", "start"}
    assert {g for g in choices() if "." not in g} - {"experiment"} == groups
    rooms = {"model": "models", "optimizer": "optimizers", "task": "tasks", "schedule": "schedules"}
    assert {rooms.get(g, g) for g in groups} <= set(FLOOR)


def test_yaml_holds_values_only() -> None:
    for file in CONF.rglob("*.yaml"):
        assert "_target_" not in file.read_text()


def test_the_wheel_ships_what_the_checkout_has() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"conf": "trainkit/conf"}
