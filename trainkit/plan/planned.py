"""A plan: what a run would take, and whether it fits."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from trainkit import spread
from trainkit.errors import UserError
from trainkit.models import Foreign
from trainkit.parallel import Sizes
from trainkit.parallel.pipeline import SEVERAL, microbatches
from trainkit.plan.cards import EFFICIENCY, Card
from trainkit.plan.depth import of_depth
from trainkit.plan.live import CATEGORIES, STEP, OutOfTimeError
from trainkit.plan.trace import Numbers, microbatch, trace
from trainkit.plan.world import NODE, Line, looked_at, started
from trainkit.run import Run

BUBBLE = {"zero_bubble": 1 / 3, "zbv": 0.0}  # of what a pipeline stands still by other schedules (Qi et al. 2023)


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
class Talk:
    """What a rank sends in a step to the others along some axes, and how long that takes, beside the rest or not."""

    axes: str
    collective: str
    sent: int
    seconds: float

    @property
    def waited_for(self) -> bool:
        """Whether the rest of the step waits meanwhile."""
        return Line(self.axes, 0, 0).waited_for


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
    talk: tuple[Talk, ...]
    moved_bytes: int
    checkpoint_bytes: int
    microbatch: int
    steps: int
    tokens_per_step: int
    step_s: float
    depths: tuple[int, ...]  # that were traced
    compile: str = "off"  # as the run asks; what is planned is eager
    sizes: Sizes = field(default_factory=Sizes)
    bubble: float = 0.0  # share of the step in which a pipeline's rank stands still
    evaluated: bool = True  # whether evaluations were traced

    @property
    def sent_bytes(self) -> int:
        """What a rank sends in a step."""
        return sum(t.sent for t in self.talk)

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
    run = check(run, setting)
    sizes = mesh_of(run, setting)
    found = {rank: _numbers(run, setting, rank, whole, sure, known, until) for rank in looked_at(sizes)}
    peaks_of = {rank: _peaks(run, setting, numbers) for rank, (numbers, _) in found.items()}
    fullest = max(found, key=lambda rank: max(peaks_of[rank].values()))
    numbers, depths = found[fullest]
    at = max(_places(numbers, STEP), key=lambda place: numbers[(*place, "total")])
    saved = _saved(run, setting, numbers)
    rows = run.data.batch // sizes.data
    idle = bubble(run, sizes)
    talk = {key: [n for n, _ in found.values() if key in n] for n, _ in found.values() for key in n if key[0] == "sent"}
    return Plan(
        setting=setting,
        parameters=run.model.parameters(),
        flops_per_token=run.model.flops_per_token(run.data.length, head=run.task.head),
        peaks=peaks_of[fullest],
        by_category={category: round(numbers.get((*at, category), 0)) for category in CATEGORIES},
        needed=setting.card.needed(max(peaks_of[fullest].values()), setting.ranks),
        host_bytes=round(numbers["host",]) + (saved if setting.card.cuda and run.checkpoint.asynchronous else 0),
        talk=tuple(
            Talk(key[1], key[2], round(max(n[key] for n in of)), max(n["talked", *key[1:]] for n in of))
            for key, of in sorted(talk.items())
        ),
        moved_bytes=round(_sum(numbers, "moved")),
        checkpoint_bytes=saved,
        microbatch=rows // microbatches(rows, microbatch(run, rows), sizes.pp)
        if sizes.pp > 1
        else microbatch(run, rows),
        steps=run.steps,
        tokens_per_step=run.data.batch * run.data.length,
        step_s=max(_sum(n, "seconds") for n, _ in found.values()) / (1 - idle),
        depths=tuple(depths),
        compile=run.compile,
        sizes=sizes,
        bubble=idle,
        evaluated=sizes.pp == 1,
    )


def _numbers(
    run: Run,
    setting: Setting,
    rank: int,
    whole: bool,
    sure: bool,
    known: dict[int, Numbers] | None,
    until: float | None,
) -> tuple[Numbers, list[int]]:
    """What one rank takes, and the depths that were traced to know it: whole numbers of blocks on every stage."""
    card, sizes = setting.card, mesh_of(run, setting)
    seconds = partial(card.seconds, efficiency=setting.share, tf32=run.precision.tf32)
    how: dict[str, Any] = {"documents": setting.documents, "until": until, "rank": rank, "size": setting.ranks}
    tracing = partial(trace, run, card.device(), seconds, **how)
    each = sizes.pp * (SEVERAL.get(run.parallel.schedule, 1) if sizes.pp > 1 else 1)
    try:
        if whole or isinstance(run.model, Foreign):  # of which nothing can be left out
            return tracing(), [run.model.depth]
        numbers, depths = of_depth(run.model.depth // each, lambda d: tracing(depth=d * each), sure=sure, known=known)
        return numbers, [d * each for d in depths]
    except OutOfTimeError:
        raise
    except RuntimeError as error:  # of an operator that fake tensors cannot take the place of
        why = str(error).splitlines()[0]
        raise UserError(
            f"{run.memory.describe()} cannot be traced without being run ({why}): plan it with other strategies"
        ) from error


def check(run: Run, setting: Setting) -> Run:
    """The run, with a mesh that so many ranks make.

    Raises:
        UserError: they cannot share the run, in the words of training.
    """
    if setting.ranks > 1 and run.parallel.kind == "single" and not run.parallel.given():
        raise UserError(
            f"parallel=single trains on one GPU, and there are {setting.ranks}: add parallel=ddp or parallel=fsdp"
        )
    with started(setting.ranks):
        run = spread.settled(run, memory=setting.card.bytes)
        spread.check(run)
    return run


def mesh_of(run: Run, setting: Setting) -> Sizes:
    """Of the mesh that so many ranks make."""
    return run.parallel.sizes(setting.ranks, max(1, setting.ranks // NODE))


def bubble(run: Run, sizes: Sizes) -> float:
    """The share of a step in which a rank of a pipeline has nothing to do (Narayanan et al. 2021, arXiv:2104.04473)."""
    if sizes.pp == 1:
        return 0.0
    rows, schedule = run.data.batch // sizes.data, run.parallel.schedule
    count = microbatches(rows, microbatch(run, rows), sizes.pp)
    idle = (sizes.pp - 1) / SEVERAL.get(schedule, 1) * BUBBLE.get(schedule, 1.0)
    return idle / (idle + count)


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
    sizes = mesh_of(run, setting)
    copies = sizes.dp_replicate * (1 if run.parallel.shards else sizes.cp)
    return round(numbers["saved",] / copies)


def _sum(numbers: Numbers, name: str) -> float:
    return sum(numbers.get((name, phase), 0) for phase in STEP)


def with_microbatch(run: Run, rows: int) -> Run:
    """`run` with so many rows at once."""
    return replace(run, memory=replace(run.memory, microbatch=rows))
