"""A run, whole: composed by Hydra, typed by pydantic, and known nowhere below.

This is the only module that imports hydra, omegaconf or pydantic.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError
from yaml import YAMLError

from trainkit import atomic
from trainkit.checkpoint import Checkpoint, Keeping
from trainkit.choices import CONF
from trainkit.config import Count, Natural, NonNegative, config, how
from trainkit.data import Data
from trainkit.errors import RefusedError, UserError, nearest
from trainkit.evaluation import Evaluation
from trainkit.exact import MOST_ROWS
from trainkit.guard import Guard
from trainkit.hf import resolve
from trainkit.memory import Memory
from trainkit.models import Model
from trainkit.optimizers import Optimizer
from trainkit.overrides import Overrides, explain, typed_wrongly
from trainkit.parallel import Parallel
from trainkit.precision import MULTIPLE, Precision
from trainkit.profile import Profile
from trainkit.schedules import Schedule
from trainkit.speed import Speed
from trainkit.strict import MAX_YAML, one_line, parse_yaml, read_file, reason, write_yaml
from trainkit.tasks import Task
from trainkit.tracking import Tracking
from trainkit.trees import flat, get, put, what

HOW_GROUPS = ("memory", "parallel", "checkpoint", "guard", "evaluation", "tracking", "profile", "speed")
FILE = "run.yaml"
GIVE = {  # which data have what a task takes
    "text": "text, shards or mixture",
    "pairs": "pairs, wordnet or stsb",
    "conversations": "chat",
    "preferences": "preferences",
}


@config
class Run:
    """Everything that a person chose. Saved as `run.yaml` it is whole: `resume` reads that file alone."""

    name: str = how(None)
    # what is learned
    steps: Count
    seed: Natural
    clip: NonNegative
    start_from: str | None = how(None)
    start: str | None = None  # what `start_from` was when the run began: RUN/step-N@HASH, which no one has to give
    task: Annotated[Task, Field(discriminator="kind")]
    model: Annotated[Model, Field(discriminator="kind")]
    data: Annotated[Data, Field(discriminator="kind")]
    optimizer: Annotated[Optimizer, Field(discriminator="kind")]
    schedule: Schedule
    precision: Precision
    # how it is done: free to differ on resume
    stop_at: Count | None = how(None)
    compile: Literal["off", "blocks", "full"] = how("off")
    deterministic: Literal["layout", "elastic"] = how("layout")
    notify: tuple[str, ...] = how(())
    memory: Memory
    parallel: Parallel
    checkpoint: Checkpoint
    guard: Guard
    evaluation: Evaluation
    tracking: Tracking
    profile: Profile = Profile()
    speed: Speed = Speed()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", self.name or ""):
            raise ValueError(f"name={self.name} is not a folder's name: letters, digits and . _ + - only")
        self.schedule.check(self.steps)
        if self.data.gives != self.task.takes:
            raise ValueError(
                f"task={self.task.kind} learns from {self.task.takes}, and data={self.data.kind} has {self.data.gives}: "
                f"use data={GIVE[self.task.takes]}"
            )
        self.memory.check(
            **{name: getattr(self, name) for name in ("optimizer", "clip", "precision", "guard", "parallel")},
            batch=self.data.batch,
            deterministic=self.deterministic,
            compile=self.compile,
        )
        rest = ("task", "memory", "precision", "optimizer", "model", "deterministic", "compile")
        self.parallel.check_run(**{name: getattr(self, name) for name in rest})
        if self.deterministic == "elastic" and self.data.batch > MOST_ROWS:
            raise ValueError(f"deterministic=elastic sums {MOST_ROWS} rows at most: lower data.batch={self.data.batch}")
        if self.deterministic == "elastic" and getattr(self.data, "tokens", None) is not None:
            raise ValueError(
                "deterministic=elastic knows a row by its place in batches of one size: data.tokens must go"
            )
        if self.data.length > self.model.context:
            raise ValueError(f"data.length={self.data.length} is longer than model.context={self.model.context}")
        if self.precision.float8 is not None and self.model.width % MULTIPLE:
            raise ValueError(f"precision.float8 multiplies matrices with sides of {MULTIPLE}n: change model.width")
        if self.model.adapter is not None and self.precision.float8 is not None:
            raise ValueError("precision.float8 trains a model's own matrices: use precision=bf16 with model.adapter")
        if self.model.adapter is not None and self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer=muon is for whole matrices, not for the factors of model.adapter: use adamw or sgd"
            )
        if self.model.adapter is not None and self.start_from is None:
            raise ValueError("model.adapter learns beside a trained model: name its checkpoint, start_from=CHECKPOINT")
        if self.speed.attention == "flex" and self.model.dropout:
            raise ValueError("speed.attention=flex has no dropout: use speed.attention=sdpa, or model.dropout=0")
        if self.speed.cuda_graphs and self.compile == "off":
            raise ValueError("speed.cuda_graphs records what is compiled: add compile=blocks or compile=full")
        if self.speed.cuda_graphs and self.memory.microbatch not in (None, self.data.batch):
            raise ValueError("speed.cuda_graphs takes a step's rows at once: leave memory.microbatch out")
        if self.evaluation.metric not in self.task.metrics:
            known = nearest(self.evaluation.metric, self.task.metrics)
            raise ValueError(f"evaluation.metric={self.evaluation.metric} is not measured by {self.task.kind}{known}")
        self.task.check(self.model)

    def what(self) -> dict[str, Any]:
        """The values that decide what is learned, by dotted key."""
        return flat({k: v for k, v in what(self).items() if k not in HOW_GROUPS})

    def yaml(self) -> str:
        """The run as `run.yaml` holds it: without the addresses that are told how it goes, which may hold secrets, and which
        nobody else's run should contact."""
        tree = {**_types().dump_python(self, mode="json"), "notify": []}
        return write_yaml(tree)

    def differs(self, other: "Run") -> list[str]:
        """What is learned here and not there: `optimizer.lr: 0.001 here, 0.01 there`, one line a key."""
        here, there = self.what(), other.what()
        keys = [k for k in here | there if here.get(k) != there.get(k)]
        return [f"{k}: {here.get(k, 'absent')} here, {there.get(k, 'absent')} there" for k in keys]


def composed(overrides: list[str], config_dir: Path | None = None) -> Run:
    """The run that `conf/` and a person's overrides make.

    Raises:
        UserError: an override that is not one, an unknown group choice or key, a wrong type or value.
    """
    given = Overrides(Run, overrides, config_dir)
    tree = _composed(given.hydra(), config_dir)
    return _typed(resolve.resolved(tree, [*given.values(), *given.groups()]))


def saved(
    text: str | bytes, overrides: Sequence[str] = (), *, config_dir: Path | None = None, free: Sequence[str] = ()
) -> Run:
    """The run of a `run.yaml`, with overrides of how it is done, and of the groups that are `free` to change as well.

    The file may be anyone's: it is data, of which nothing is resolved, looked up or made.

    Raises:
        UserError: the file is not a run's, or an override is wrong or would change what is learned.
    """
    try:
        tree = parse_yaml(text if isinstance(text, str) else text.decode())
    except ValueError as error:
        raise UserError(f"{FILE} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{FILE} holds no run")
    before = _typed(tree)
    given = Overrides(Run, list(overrides), config_dir)
    for group in given.groups():
        if group not in (*HOW_GROUPS, *free):
            raise UserError(
                f"{group}= says what is learned, which cannot change on resume: train under another name instead"
            )
    if overrides:
        fresh = _composed(given.hydra(), config_dir)
        for group in given.groups():
            tree[group] = fresh[group]
        for key in given.values():
            put(tree, key, get(fresh, key))
    after = _typed(tree)
    if changed := [line for line in before.differs(after) if line.split(".")[0] not in free]:
        raise UserError(
            f"what is learned cannot change on resume ({changed[0].split(':')[0]}): train under another name instead"
        )
    return after


def adopted(text: str, origin: str | None) -> tuple[str, str | None]:
    """A `run.yaml` that came here from elsewhere, as one of this machine's: without a mirror that is not `origin`, the
    address that it came from; and that mirror."""
    run = saved(text)
    mirror = run.checkpoint.mirror
    if mirror is None or (origin is not None and _bare(mirror) == _bare(origin)):
        return text, None
    return replace(run, checkpoint=replace(run.checkpoint, mirror=None)).yaml(), _bare(mirror)


def differ(one: str, other: str) -> list[str]:
    """What two texts of `run.yaml` say differently of what is learned."""
    return saved(one).differs(saved(other))


def read(folder: Path) -> Run | None:
    """The run that a folder belongs to, or None where there is none yet."""
    return saved(content(folder)) if (folder / FILE).exists() else None


def content(folder: Path) -> bytes:
    """The `run.yaml` of a run's folder.

    Raises:
        UserError: it is missing, not a file, or much longer than any.
    """
    try:
        return read_file(folder / FILE, MAX_YAML)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / FILE} cannot be read: {reason(error)}") from error


def claim(folder: Path, run: Run) -> None:
    """Make `folder` this run's own, durably. The same run may come back to it, done another way.

    Raises:
        UserError: another run has that name, with what differs.
    """
    refuse_another(folder, run)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / FILE, run.yaml().encode())


def refuse_another(folder: Path, run: Run) -> None:
    """Raise UserError when `folder` is the folder of a run that learns something else."""
    there = read(folder)
    if there is not None and (changed := run.differs(there)):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"the name '{run.name}' is taken by another run ({'; '.join(changed[:3])}{more}): "
            f"choose another with name=..., or give the same values to go on with it"
        )


def policy(folder: Path) -> Keeping:
    """What a run's own config says about its tiers."""
    run = read(folder)
    higher = run.evaluation.higher_is_better if run else False
    return (run.checkpoint if run else Checkpoint()).keeping(higher_is_better=higher)


def _composed(overrides: list[str], config_dir: Path | None) -> dict[str, Any]:
    search = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = compose("config", [*search, *overrides], return_hydra_config=True)
        choices = node.hydra.runtime.choices
        with_name = OmegaConf.masked_copy(node, [str(k) for k in node if k not in ("hydra", "experiment")])
        tree = OmegaConf.to_container(with_name, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_first_line(error.__cause__ or error)) from error
    assert isinstance(tree, dict)
    if tree.get("name") is None:
        adapter = f"-{choices['model/adapter']}" if choices.get("model/adapter") else ""
        tree["name"] = choices.get("experiment") or f"{choices['model']}-{choices['data']}{adapter}"
    return tree  # type: ignore[return-value]  # keys are strings


@cache
def _types() -> TypeAdapter[Run]:
    """What makes a `Run` of a tree; made once, because that takes longer than its use."""
    return TypeAdapter(Run)


def _typed(tree: dict[str, Any]) -> Run:
    try:
        run = _types().validate_python(tree)
    except ValidationError as error:
        found = error.errors()
        kind = RefusedError if all(e["type"] == "value_error" for e in found) else UserError
        raise kind(one_line("; ".join(explain(Run, e) for e in found[:3]))) from error
    if wrong := typed_wrongly(tree, run):
        raise UserError(wrong)
    return run


def _bare(url: str) -> str:
    """An address without a password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url.rstrip("/"))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
