"""Which rank's machine was it? Real processes, one of which computes wrongly."""

from pathlib import Path

import pytest

from tests.faults import Fault, bad_data, equal, fit, logged, order, said
from tests.ranks import in_ranks
from tests.test_guard import only_in


def train(name: str, how: list[str], faults: tuple[Fault, ...]) -> None:
    fit(name, *how, faults=faults)


RANKS = {
    "ddp": (["parallel=ddp", "guard.policy=skip"], ["1", "0", "1", "1"]),
    "fsdp": (["parallel=fsdp", "guard.policy=rewind"], ["1", "0 or 1", "1", "0 or 1"]),
    "elastic": (["parallel=ddp", "deterministic=elastic"], ["1", "0", "1", "1"]),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", RANKS)
def test_the_rank_that_was_wrong_is_named(kind: str) -> None:
    how, blamed = RANKS[kind]
    what = [*how, "steps=8", "model.dropout=0.1", "guard.check_every=8"]
    faults = (
        Fault(1, "forward", "nan", rank=1),
        Fault(3, "backward", "inf", rank=0),
        Fault(5, "summed", "nan", rank=1),
        Fault(7, "forward", "slight", rank=1),
    )
    in_ranks(2, train, "clean", what, ())
    in_ranks(2, train, "faulty", what, faults)
    equal("faulty", "clean")
    found = [line.split("machine at ")[1].split(", not of")[0] for line in said("faulty")]
    named = [" or ".join(word.removeprefix("rank ").split()[0] for word in line.split(" or ")) for line in found]
    assert named == blamed


def train_on_bad_data(name: str, how: list[str], samples: list[int]) -> None:
    with bad_data(set(samples)):
        fit(name, *how)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bad_data_are_bad_on_any_ranks(kind: str, place: Path) -> None:
    samples = sorted(only_in(order(place), 5))
    what = [f"parallel={kind}", "steps=8", "guard.policy=skip"]
    in_ranks(2, train_on_bad_data, "bad", what, samples)
    (line,) = said("bad")
    assert "step 6, computed again, gives the same (loss nan" in line
    assert len(logged("bad")) == 8
