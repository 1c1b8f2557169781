"""Where ranks meet, and what they have to have in common before they begin. All of it is text in torch's store."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from trainkit.errors import UserError

TIMEOUT = timedelta(minutes=10)  # a rank that says nothing for so long is taken for dead
SHOWN = 3  # differences


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
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def agree(store: dist.Store, rank: int, size: int, facts: Mapping[str, str]) -> None:
    """Compare the `facts` of all ranks; every one of them calls this. The first rank does it, so that each has one answer
    to wait for.

    Raises:
        UserError: on all ranks, with the facts that differ and on which ranks.
    """
    store.set(f"facts-{rank}", json.dumps(dict(facts)))
    if rank == 0:
        found = [json.loads(store.get(f"facts-{other}")) for other in range(size)]
        store.set("verdict", differing(found) or "")
    if verdict := store.get("verdict").decode():
        store.set(f"heard-{rank}", "")
        if rank == 0:  # it may keep the store
            store.wait([f"heard-{other}" for other in range(size)])
        raise UserError(verdict)


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
