"""How many rows go through the model at once: found by trial before a run, halved when memory runs out in it.

Grade: reordered. Another microbatch adds the same gradients in another order. Where a model drops out, other masks are
drawn: another sample of the same run, as with any other microbatch that a person chooses.
"""

import gc
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from trainkit import atomic
from trainkit.errors import RanOutError
from trainkit.memory.room import Room, ran_out
from trainkit.strict import parse_json, read_file

T = TypeVar("T")
MARGIN = 0.9  # of what is free; fragments and what varies from step to step take the rest
NAME = "microbatch.json"
ELSEWHERE = "another rank ran out of memory"


@dataclass
class Fitting:
    """`rows` go through the model at once. `advice` is what a person can do where not even one row fits; `changed(rows)`
    makes it durable that so many are enough to ask for, and `note` says what happened."""

    rows: int
    ranks: Any
    advice: str = "choose a smaller model or data.length"
    changed: Callable[[int], None] = lambda rows: None
    note: Callable[[str], None] = lambda text: None
    proven: int = 0  # rows with which a step was made; one that all ranks know

    def run(self, model: Any, work: Callable[[int], T]) -> T:
        """`work(rows)`, again with half the rows as long as memory runs out in it. The first step of so many rows is summed
        over the ranks only when all have come through it.

        Ranks whose sums are under way cannot go back: one that runs out then makes it durable that half is enough, and
        ends; torchrun ends the others and starts all of them anew.

        Raises:
            RanOutError: one row is too many, or ranks were in the middle of their sums.
        """
        while True:
            self.ranks.careful = self.ranks.size > 1 and self.rows != self.proven
            found, why = attempt(lambda: work(self.rows), self.ranks)
            if why is None:
                self.proven, self.ranks.careful = self.rows, False
                return found  # type: ignore[return-value]  # there is one where nothing went wrong
            half = -(-self.rows // 2)
            if self.rows == 1:
                raise RanOutError(f"not even one row at a time fits ({why}): {self.advice}")
            self.changed(half)
            if not can_go_back(self.ranks, model):
                raise RanOutError(
                    f"{self.rows} rows at once are too many ({why}): started again, it goes on with {half}"
                )
            clean_up(model, self.ranks.device)
            self.note(f"warning: {self.rows} rows at once are too many ({why}): the step is done again with {half}")
            self.rows = half


def largest(it: Any, *, start: int | None = None) -> int:
    """The most rows, of a rank's share halved over and over, with which a step of the learner `it` fits. All ranks agree.

    Each trial is a forward and a backward of two microbatches, so that gradients are there beside the second one's
    activations; no update is made and nothing is left behind. It begins with one row, or with `start` (an estimate),
    and goes up while what was measured lets the next one fit, too, with room for an optimizer's two moments if it has
    made none yet.

    Raises:
        RanOutError: memory ran out on ranks that were in the middle of their sums.
    """
    sizes = list(_sizes(it.loader.batch // it.ranks.readers))
    room = Room(it.ranks.device)
    free = MARGIN * room.free - _moments_to_come(it)
    at = max((i for i, rows in enumerate(sizes) if rows <= (start or 1)), default=0)
    taken: dict[int, int] = {}
    while True:
        rows = sizes[at]
        room.begin()
        it.ranks.careful = it.ranks.size > 1
        _, why = attempt(lambda rows=rows: it.rehearse(rows), it.ranks)  # type: ignore[misc]  # a default, not a parameter
        if why is not None and not can_go_back(it.ranks, it.model):
            it.fitting.changed(-(-rows // 2))
            raise RanOutError(f"{rows} rows at once are too many ({why}): start again")
        it.ranks.careful = False
        taken[rows] = room.taken()
        clean_up(it.model, it.ranks.device)
        if it.ranks.all_fit(why is None and taken[rows] <= free):
            if at + 1 == len(sizes) or sizes[at + 1] in taken:
                return rows
            if not it.ranks.all_fit(_foreseen(taken, sizes[at + 1], _gradients(it)) <= free):
                return rows
            at += 1
        elif at == 0 or sizes[at - 1] in taken:
            return sizes[max(at - 1, 0)]
        else:
            at -= 1


def settle(it: Any, folder: Path, asked: int | str | None, how: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Decide how many rows a run's steps begin with: what its folder remembers of a run done in the same way, else what is
    found by trial if `asked` is auto, else what was asked for. `how` is all that the memory a row takes depends on.
    """
    file, asking = folder / NAME, {"asked": asked, **how, "ranks": it.ranks.size}

    def remember(rows: int) -> None:
        if folder.is_dir():
            atomic.write(file, json.dumps({**asking, "rows": rows}).encode())

    def remembered() -> int | None:
        try:
            found = parse_json(read_file(file, 1 << 16), max_bytes=1 << 16)
        except (OSError, ValueError):
            return None  # it is not there, or not ours
        rows = found.pop("rows", None) if isinstance(found, dict) else None
        return rows if isinstance(rows, int) and rows > 0 and found == asking else None

    known = it.ranks.host.first_does(remembered)
    it.fitting.changed, it.fitting.note = remember, note
    if known is not None:
        it.fitting.rows = min(known, it.fitting.rows)
    elif asked == "auto":
        it.fitting.rows = largest(it)
        it.ranks.host.first_does(lambda: remember(it.fitting.rows))


def attempt(work: Callable[[], T], ranks: Any) -> tuple[T | None, str | None]:
    """What `work` gives, or None and in short why memory ran out. Nothing that it had made is held any more, and the other
    ranks know of it where they wait to hear."""
    try:
        return work(), None
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        found = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
        why = (
            found[0][0].lower() + found[0][1:]
            if found
            else (str(error).splitlines() or [type(error).__name__])[0][:120]
        )
        traceback.clear_frames(error.__traceback__)
    if ranks.careful and ranks.can_go_back and why != ELSEWHERE:
        ranks.all_fit(False)
    return None, why


def can_go_back(ranks: Any, model: Any) -> bool:
    """Whether no rank waits in the middle of a sum, and the model can forget a pass that broke off."""
    if ranks.size > 1:
        return bool(ranks.can_go_back and ranks.careful)
    return ranks.kind != "fsdp" or hasattr(model, "reset_iter_state")


def clean_up(model: Any, device: torch.device) -> None:
    """Forget gradients and whatever a pass that broke off has left in the model, and give memory back."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()  # FSDP's
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _sizes(rows: int) -> Iterator[int]:
    """`rows` in ever fewer equal parts: 1, 2, 3, 6, 12."""
    parts = 1 << (rows - 1).bit_length()
    while parts:
        yield -(-rows // parts)
        parts >>= 1


def _foreseen(taken: Mapping[int, int], rows: int, gradients: int) -> float:
    """What `rows` will take: a fixed part and one for every row, by the two largest that were tried; by a single one, of
    which the gradients are what is fixed."""
    known = sorted(taken.items())[-2:]
    (few, less), (many, more) = known if len(known) == 2 else [(0, min(gradients, known[0][1])), known[0]]
    return more + (more - less) / (many - few) * (rows - many)


def _gradients(it: Any) -> int:
    return sum(p.nbytes for p in it.parameters if p.device.type == it.ranks.device.type)


def _moments_to_come(it: Any) -> int:
    return 0 if it.optimizer.state else 2 * _gradients(it)
