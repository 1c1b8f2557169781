"""Small words between ranks, on the host, as JSON: torch's own object collectives would send pickles."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainkit.errors import FAILED, LostError


class ElsewhereError(RuntimeError):
    """Another rank failed, and said why there. It carries that rank's exit code."""

    def __init__(self, rank: int, code: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.exit_code, self.text = code, text


class LostRankError(LostError):
    """Another rank is not there any more. Nothing that takes all of them can be done again by this process."""


@dataclass(frozen=True)
class Group:
    """Ranks that can talk. Alone there is nobody to wait for. Every method is called by all of them, in the same order,
    and raises LostRankError where one of them does not answer."""

    rank: int = 0
    size: int = 1
    process_group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _together():
            dist.all_gather(lengths, torch.tensor([len(mine)]), group=self.process_group)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        words = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        with _together():
            dist.all_gather(words, padded, group=self.process_group)
        return [json.loads(bytes(w[: int(n)].numpy())) for w, n in zip(words, lengths, strict=True)]

    def max(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return value
        largest = torch.tensor([value])
        with _together():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.process_group)
        return int(largest)

    def all_do(self, work: Callable[[], Any]) -> list[Any]:
        """Do `work` on every rank, and give every rank all results (JSON). Where it fails on one it fails on all.

        Raises:
            ElsewhereError: it failed on another rank. Where it failed, what it raised.
        """
        if self.size == 1:
            return [work()]
        error: BaseException | None = None
        outcome: dict[str, Any] = {}
        try:
            outcome["value"] = work()
        except BaseException as raised:
            error = raised
            outcome = {"code": getattr(raised, "exit_code", FAILED), "error": f"{type(raised).__name__}: {raised}"}
            if outcome["code"] != FAILED:
                outcome["error"] = str(raised)
        outcomes = self.gather(outcome)
        if error is not None:
            raise error
        for rank, other in enumerate(outcomes):
            if "error" in other:
                raise ElsewhereError(rank, other["code"], other["error"])
        return [other["value"] for other in outcomes]

    def first_does(self, work: Callable[[], Any]) -> Any:
        """Do `work` on the first rank only, and give every rank its result (JSON).

        Raises:
            ElsewhereError: it failed there.
        """
        return self.all_do(lambda: work() if self.rank == 0 else None)[0]


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's own: a closed connection, or a timeout
        raise LostRankError(f"another rank does not answer: {error}") from error
