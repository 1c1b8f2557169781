"""A program that saves, to be run under the shim: reads jobs from stdin, does each in forked children, says the outcome.

A job is `begin` (save steps 1 and 2, then step 3 with a fault at a system call of one rank, then tell what was
acknowledged) or `resume` (load the newest, save step 4, and say what was loaded), on so many ranks.
"""

import ctypes
import gc
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainkit.checkpoint import Checkpoint, Checkpointer, SaveFailed, files
from trainkit.parallel import Group, LostRankError

SHIM = ctypes.CDLL(os.environ["LD_PRELOAD"])
files._CHUNK = 1 << 17  # so that a file has blocks, and a rest
FILES = {"run.yaml": b"name: t\n", "tokenizer.json": b"{}"}


def join(rank: int, ranks: int, meeting: str) -> Group:
    """Meet the other ranks."""
    if ranks == 1:
        return Group()
    store = dist.FileStore(meeting, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=20))
    return Group(rank, ranks, dist.group.WORLD)


def checkpointer(folder: str, group: Group) -> Checkpointer:
    policy = Checkpoint(every=1, keep=2, keep_best=0, asynchronous=bool(int(os.environ["ASYNCHRONOUS"])))
    return policy.build(Path(folder), higher_is_better=False, versions={"trainkit": "test"}, host=group, saving=group)


def content(step: int) -> dict[str, torch.Tensor]:
    large = {f"model.{name}": torch.full((200, 100), float(step)) for name in "abcd"}  # so that every rank has some
    return {**large, "model.scalar": torch.tensor(step), "random": torch.zeros(0)}


def save(it: Checkpointer, step: int) -> None:
    facts = {"metric": 1.0 / step, "epoch_end": False, "epoch": 0.0, "val_loss": None}
    it.save(step, content(step), {"step": step}, FILES, facts=facts)
    it.wait()
    for outcome in it.finished():
        if outcome.error:
            raise outcome.error


def begin(
    group: Group, folder: str, fault: str, at: int, sticky: int, log: str, victim: int, wait_s: float
) -> dict[str, object]:
    it = checkpointer(folder, group)
    it.preflight(0)
    save(it, 1)
    save(it, 2)
    if group.rank == victim:
        SHIM.shim_arm(at, fault.encode(), sticky, log.encode())
    try:
        save(it, 3)
    except LostRankError as error:  # the other rank was killed: this one leaves, too
        return {"acknowledged": 2, "failed": str(error), "calls": SHIM.shim_disarm()}
    except SaveFailed as error:
        calls = SHIM.shim_disarm()
        if fault.isdigit():  # the disk is well again, and nobody has died
            save(it, 3)
        return {"acknowledged": 3 if fault.isdigit() else 2, "failed": str(error), "calls": calls}
    calls = SHIM.shim_disarm()
    if fault == "cut":  # none of the calls was cut, so now: what was acknowledged has to be there
        time.sleep(wait_s)
        SHIM.shim_cut()
    return {"acknowledged": 3, "calls": calls}


def resume(group: Group, folder: str) -> dict[str, object]:
    it = checkpointer(folder, group)
    it.preflight(0)
    found = it.load_latest()
    assert found is not None
    whole = all(torch.equal(found.tensors[name], tensor) for name, tensor in content(found.step).items())
    save(it, 4)
    again = it.load_latest()
    assert again is not None
    left = sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())
    return {
        "step": found.step,
        "whole": whole and found.state == {"step": found.step},
        "next": again.step,
        "left": left,
    }


def child(rank: int, job: dict[str, Any]) -> None:
    """Do a job on one rank, and leave."""
    os.environ.update(job["environment"])
    try:
        group = join(rank, job["ranks"], job["meeting"])
        result = begin(group, **job["begin"]) if "begin" in job else resume(group, **job["resume"])
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(f"{job['answer']}.{rank}").write_text(json.dumps(result))
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that no child looks at all that was imported, and copies it
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["ranks"]):
            if (pid := os.fork()) == 0:
                child(rank, job)
            children.append(pid)
        ends = [os.waitpid(pid, 0)[1] for pid in children]
        print(json.dumps({"killed": [os.WIFSIGNALED(end) for end in ends]}), flush=True)


if __name__ == "__main__":
    main()
