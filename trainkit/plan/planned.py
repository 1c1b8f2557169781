"""A plan: what a run would take, and whether it fits."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from trainkit.errors import UserError
from trainkit.models import Foreign
from trainkit.plan.cards import EFFICIENCY, Card
from trainkit.plan.depth import of_depth
from trainkit.plan.live import CATEGORIES, STEP, OutOfTimeError
from trainkit.plan.trace import Numbers, microbatch, trace
from trainkit.run import Run

KNOWN = ("ddp", "fsdp")  # meshes of one axis


@dataclass(frozen=True)
class Setting:
    """What a run is planned for: `ranks` of `card`, each at `efficiency` of its peak (None: the usual share), in rows that
    hold several `documents` or one."""

    card: Card
    ranks: int = 1
    efficiency: float | None = None
    documents: bool = True
    price: float | None = None  # of one card, an hour

    @property
    def share(self) -> float:
        """Of the peak, for large matrix products."""
        return self.efficiency or EFFICIENCY["cuda" if self.card.cuda else "cpu"]


@dataclass(frozen=True)
class Plan:
    """What one rank takes. `peaks` are bytes that the allocator hands out, `needed` those of the device with all else."""

    setting: Setting
    parameters: int
    flops_per_token: float
    peaks: dict[str, int]
    by_category: dict[str, int]  # at the peak of training
    needed: int
    host_bytes: int
    sent_bytes: int
    moved_bytes: int
    checkpoint_bytes: int
    microbatch: int
    steps: int
    tokens_per_step: int
    step_s: float
    depths: tuple[int, ...]  # that were traced
    compile: str = "off"  # as the run asks; what is planned is eager

    @property
    def fits(self) -> bool:
        """Whether the device has so much."""
        return self.needed <= self.setting.card.bytes

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens_per_step / self.step_s

    @property
    def hours(self) -> float:
        """From the first step to the last, without evaluations and saves."""
        return self.steps * self.step_s / 3600

    @property
    def cost(self) -> float | None:
        """Of all cards for those hours, where the price of one is known."""
        price = self.setting.price
        return None if price is None else self.hours * price * self.setting.ranks


def plan(
    run: Run,
    setting: Setting,
    *,
    whole: bool = False,
    sure: bool = True,
    known: dict[int, Numbers] | None = None,
    until: float | None = None,
) -> Plan:
    """What `run` takes.

    Args:
        whole: trace every block, where otherwise a few say it of all.
        sure, known: as `depth.of_depth` has them.
        until: when `time.monotonic()` is at this, it ends.

    Raises:
        OutOfTimeError: it is that late.
        UserError: the batch does not divide over the ranks, several ranks have nothing to do, or a strategy cannot be
            traced.
    """
    check(run, setting.ranks)
    card = setting.card
    seconds = partial(card.seconds, efficiency=setting.share, tf32=run.precision.tf32)
    tracing = partial(trace, run, card.device(setting.ranks), seconds, documents=setting.documents, until=until)
    depth, whole = run.model.depth, whole or isinstance(run.model, Foreign)  # of which nothing can be left out
    try:
        if whole:
            numbers, depths = tracing(), [depth]
        else:
            numbers, depths = of_depth(depth, lambda d: tracing(depth=d), sure=sure, known=known)
    except OutOfTimeError:
        raise
    except RuntimeError as error:  # of an operator that fake tensors cannot take the place of
        why = str(error).splitlines()[0]
        raise UserError(
            f"{run.memory.describe()} cannot be traced without being run ({why}): plan it with other strategies"
        ) from error
    peaks = _peaks(run, setting, numbers)
    at = max(_places(numbers, STEP), key=lambda place: numbers[(*place, "total")])
    by_category = {category: round(numbers.get((*at, category), 0)) for category in CATEGORIES}
    rows = run.data.batch // setting.ranks
    saved = _saved(run, setting, numbers)
    return Plan(
        setting=setting,
        parameters=run.model.parameters(),
        flops_per_token=run.model.flops_per_token(run.data.length, head=run.task.head),
        peaks=peaks,
        by_category=by_category,
        needed=card.needed(max(peaks.values()), setting.ranks),
        host_bytes=round(numbers["host",]) + (saved if card.cuda and run.checkpoint.asynchronous else 0),
        sent_bytes=round(_sum(numbers, "sent")),
        moved_bytes=round(_sum(numbers, "moved")),
        checkpoint_bytes=saved,
        microbatch=microbatch(run, rows),
        steps=run.steps,
        tokens_per_step=run.data.batch * run.data.length,
        step_s=_sum(numbers, "seconds"),
        depths=tuple(depths),
        compile=run.compile,
    )


def check(run: Run, ranks: int) -> None:
    """Raise UserError where so many ranks cannot share the run."""
    if ranks > 1 and run.parallel.kind == "single":
        raise UserError(f"parallel=single trains on one GPU, and there are {ranks}: add parallel=ddp or parallel=fsdp")
    if run.parallel.kind not in ("single", *KNOWN) or run.parallel.given():
        raise UserError(f"plan knows {' and '.join(f'parallel={k}' for k in KNOWN)}: benchmark is for any other mesh")
    if run.data.batch % ranks:
        near = -(-run.data.batch // ranks) * ranks
        raise UserError(f"data.batch={run.data.batch} rows do not divide over {ranks} ranks: use data.batch={near}")


def _places(numbers: Numbers, phases: Any) -> list[tuple[str, ...]]:
    return [k[:3] for k in numbers if k[0] == "peak" and k[1] in phases and k[3] == "total"]


def _peaks(run: Run, setting: Setting, numbers: Numbers) -> dict[str, int]:
    """Bytes by what a run does. A save on a CPU keeps a copy of the checkpoint from then on, beside whatever follows."""

    def most(*phases: str) -> int:
        return round(max((numbers[(*place, "total")] for place in _places(numbers, phases)), default=0))

    peaks = {"building": most("building"), "training": most(*STEP), "evaluation": most("evaluation", "sample")}
    peaks |= {"resuming": most("resume")}
    staged = not setting.card.cuda and run.checkpoint.asynchronous
    beside = max(peaks["training"], peaks["evaluation"]) if staged else round(numbers["resident",])
    return {**peaks, "saving": beside + (_saved(run, setting, numbers) if staged else 0)}


def _saved(run: Run, setting: Setting, numbers: Numbers) -> int:
    """Bytes of a checkpoint that this rank writes: replicas share them out."""
    return round(numbers["saved",] / (setting.ranks if run.parallel.kind == "ddp" else 1))


def _sum(numbers: Numbers, name: str) -> float:
    return sum(numbers.get((name, phase), 0) for phase in STEP)


def with_microbatch(run: Run, rows: int) -> Run:
    """`run` with so many rows at once."""
    return replace(run, memory=replace(run.memory, microbatch=rows))
