"""Where ranks meet, and what they have to have in common before they begin. All of it is text in torch's store."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from trainkit.errors import UserError, again
from trainkit.parallel.group import LostRankError

TIMEOUT = timedelta(minutes=10)  # a rank that says nothing for so long is taken for dead
SHOWN = 3  # differences
FIRST_LOOK_S, LAST_LOOK_S = 0.005, 0.5  # how long to wait before the next look for what another rank says


def meeting() -> dist.Store:
    """Where ranks leave their addresses. torchrun keeps it over restarts, so every attempt has a place of its own in it:
    else ranks call addresses of the dead.

    Raises:
        UserError: there are other ranks, and nothing says where.
    """
    if "MASTER_ADDR" not in os.environ:
        if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(
                f"WORLD_SIZE={size} says that there are other ranks, and no MASTER_ADDR where: use nproc={size}, start with "
                "torchrun, or unset it"
            )
        return dist.HashStore()
    keeps = os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=keeps,
        timeout=TIMEOUT,
        wait_for_workers=False,  # that would be in C++, see `_said`
        multi_tenant=True,
    )
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def agree(store: dist.Store, rank: int, size: int, facts: Mapping[str, str]) -> None:
    """Compare the `facts` of all ranks; every one of them calls this. The first rank does it, so that each has one answer
    to wait for.

    Raises:
        UserError: on all ranks, with the facts that differ and on which ranks.
        LostRankError: a rank did not come.
    """
    store.set(f"facts-{rank}", json.dumps(dict(facts)))
    if rank == 0:
        found = [json.loads(_said(store, other, f"facts-{other}")) for other in range(size)]
        store.set("verdict", differing(found) or "")
    if verdict := _said(store, 0, "verdict"):
        store.set(f"heard-{rank}", "")
        if rank == 0:  # it may keep the store
            for other in range(size):
                _said(store, other, f"heard-{other}")
        raise UserError(verdict)


def _said(store: dist.Store, rank: int, key: str) -> str:
    """What a rank says under that key. It is waited for in Python, where signals are heard: when that rank was killed,
    torchrun asks the others to leave."""
    end, pause = time.monotonic() + TIMEOUT.total_seconds(), FIRST_LOOK_S
    while not store.check([key]):
        if time.monotonic() > end:
            raise LostRankError(f"rank {rank} did not come to where the ranks meet{again()}")
        time.sleep(pause)
        pause = min(2 * pause, LAST_LOOK_S)
    return store.get(key).decode()


def differing(facts: Sequence[Mapping[str, str]]) -> str | None:
    """What is not the same on all ranks, in one sentence: which ranks have what."""
    keys = list(dict.fromkeys(key for of_one in facts for key in of_one))
    said = []
    for key in keys:
        having: dict[str, list[int]] = defaultdict(list)
        for rank, of_one in enumerate(facts):
            having[of_one.get(key, "absent")].append(rank)
        if len(having) > 1:
            said.append(f"{key} is " + ", ".join(f"{value} on {in_words(ranks)}" for value, ranks in having.items()))
    if not said:
        return None
    more = f"; and {len(said) - SHOWN} more differences" if len(said) > SHOWN else ""
    return f"the ranks are not the same: {'; '.join(said[:SHOWN])}{more}: start all of them alike"


def in_words(ranks: Sequence[int]) -> str:
    """`rank 2`, or `ranks 0-3, 6`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
