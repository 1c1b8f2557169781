"""Experiments by name. What a person says of a key stands for what the suite says of it."""

from dataclasses import dataclass

from trainkit.benchmark.rounds import Settings
from trainkit.errors import UserError, nearest

# The experiments of the two systems that trainkit set out from, its seeds: a small model at batch 256 and a GPT-2 at batch
# 32, each strategy and those that they joined. `baseline` has none, and what is added to it nothing else, so that a strategy
# is counted where it is named and nowhere else. The seeds' lengths are not known; these let the largest cell fit in 16 GiB.
_SWEEP = (
    "memory=baseline,baseline+checkpoint,baseline+8bit,fused_loss,baseline+checkpoint+8bit,checkpoint+8bit+fused_loss"
)


@dataclass(frozen=True)
class Suite:
    """Experiments, each a title and words, and how long each is measured if nothing else is said."""

    experiments: tuple[tuple[str, tuple[str, ...]], ...]
    settings: Settings


_SMALL = ("small model, batch 256", ("model=char-small", "data.batch=256", "data.length=128", _SWEEP))
_GPT2 = ("GPT-2 124M, batch 32", ("model=gpt2", "data.batch=32", "data.length=256", _SWEEP))
_ONCE = Settings(rounds=1, steps=1, warmup=1)
SUITES = {
    "seeds": Suite((_SMALL, _GPT2), _ONCE),
    "seeds-small": Suite((_SMALL,), _ONCE),
    "seeds-gpt2": Suite((_GPT2,), _ONCE),
}


def named(name: str) -> Suite:
    """The suite of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(f"there is no suite '{name}'{nearest(name, SUITES)}")
    return SUITES[name]
