"""A program that saves, to be run under the shim: reads jobs from stdin, does each in a forked child, says the outcome.

A job is `folder fault at sticky`: save steps 1 and 2, then step 3 with the fault at that system call, then tell what
was acknowledged. In between the parent asks `resume folder`: load the newest, save step 4, and say what was loaded.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

import torch

from trainkit.checkpoint import Checkpoint, Checkpointer, SaveFailed

SHIM = ctypes.CDLL(os.environ["LD_PRELOAD"])
POLICY = Checkpoint(every=1, keep=2, keep_best=0, asynchronous=bool(int(os.environ["ASYNCHRONOUS"])))
FILES = {"run.yaml": b"name: t\n", "tokenizer.json": b"{}"}


def checkpointer(folder: str) -> Checkpointer:
    return POLICY.build(Path(folder), higher_is_better=False, versions={"trainkit": "test"})


def content(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 5), float(step)), "model.b": torch.tensor(step), "random": torch.zeros(0)}


def save(it: Checkpointer, step: int) -> None:
    facts = {"metric": 1.0 / step, "epoch_end": False, "epoch": 0.0, "val_loss": None}
    it.save(step, content(step), {"step": step}, FILES, facts=facts)
    it.wait()
    for outcome in it.finished():
        if outcome.error:
            raise outcome.error


def begin(folder: str, fault: str, at: int, sticky: int, log: str) -> dict[str, object]:
    it = checkpointer(folder)
    it.preflight(0)
    save(it, 1)
    save(it, 2)
    SHIM.shim_arm(at, fault.encode(), sticky, log.encode())
    try:
        save(it, 3)
    except SaveFailed as error:
        calls = SHIM.shim_disarm()
        return {"acknowledged": 2, "failed": str(error), "calls": calls}
    return {"acknowledged": 3, "calls": SHIM.shim_disarm()}


def resume(folder: str) -> dict[str, object]:
    it = checkpointer(folder)
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


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        answer = Path(job["answer"])
        child = os.fork()
        if child == 0:
            result = begin(**job["begin"]) if "begin" in job else resume(**job["resume"])
            answer.write_text(json.dumps(result))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status), "code": status}), flush=True)


if __name__ == "__main__":
    main()
