"""What all ranks of a run have to have in common: the versions, what is learned, how it is shared, and the data."""

import dataclasses
import hashlib
import json
from typing import Any

import torch

from trainkit import versions
from trainkit.errors import UserError
from trainkit.parallel import Ranks, differing
from trainkit.run import Run
from trainkit.trees import flat

SHARED = ("memory", "parallel", "checkpoint", "guard", "evaluation")  # groups in which ranks act together
ALONE = {"parallel.device", "checkpoint.mirror"}


def facts(run: Run, device: torch.device) -> dict[str, str]:
    """What is known before ranks meet."""
    installed = versions.installed()
    values: dict[str, Any] = {name: getattr(run, name) for name in ("name", "stop_at", "compile", "deterministic")}
    for group in SHARED:
        values[group] = dataclasses.asdict(getattr(run, group))
    of_run = {key: str(value) for key, value in {**run.what(), **flat(values)}.items() if key not in ALONE}
    return {name: installed[name] for name in ("trainkit", "torch", "python")} | {"device": device.type} | of_run


def refuse_other_data(corpus: Any, ranks: Ranks) -> None:
    """Raise UserError, on all ranks, where some have read other data than others."""
    words = json.dumps(corpus.tokenizer.identity, sort_keys=True, default=str)
    own = {"data": corpus.fingerprint[:12], "tokenizer": hashlib.sha256(words.encode()).hexdigest()[:12]}
    if found := differing(ranks.host.gather(own)):
        raise UserError(found)
