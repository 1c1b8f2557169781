"""The verb `plan`: cards by name, what is said and written, and mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trainkit import cli
from trainkit.errors import UserError
from trainkit.plan import cards
from trainkit.plan.command import cards as named

H100 = cards.CARDS["h100"]
QUICK = ["model.width=32", "model.depth=2", "model.attention.heads=2", "data.length=32", "data.batch=4"]


def test_cards_by_name_and_by_size() -> None:
    assert cards.find("H100") is H100
    assert cards.find("a100_40").memory == 40
    assert cards.find("24GB").memory == 24
    assert cards.find("24GB").bf16 == cards.CARDS["rtx4090"].bf16
    assert cards.find("79GiB").memory == pytest.approx(79 * 1.073741824)
    assert cards.find("78gb").bf16 == H100.bf16
    with pytest.raises(UserError, match="did you mean 'h100'"):
        cards.find("h10O")
    with pytest.raises(UserError, match="less than any"):
        cards.find("0.1GB")


def test_several_cards() -> None:
    assert named("h100", None) == ("h100", 1)
    assert named(None, "8xh100") == ("h100", 8)
    assert named("l4", "4") == ("l4", 4)
    for wrong in ("x8", "0xh100", "eight"):
        with pytest.raises(UserError, match="not a number of GPUs"):
            named(None, wrong)
    with pytest.raises(UserError, match="different"):
        named("l4", "8xh100")


def invoked(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *QUICK, *words])


def test_a_plan_is_said_and_written(place: Path) -> None:
    result = invoked("--gpu", "24GB", "--json", "plan.json", "--price", "2")
    assert result.exit_code == 0
    assert result.stdout.startswith("fits: needs ")
    (cell,) = json.loads(Path("plan.json").read_text())["cells"]
    assert cell["overrides"] == QUICK
    assert cell["predicted_status"] == "ok"
    assert cell["predicted_peak_memory_bytes"] == max(cell["predicted_peaks"].values())
    assert set(cell["predicted_peaks"]) == {"building", "training", "evaluation", "saving", "resuming"}
    assert cell["predicted_tokens_per_s"] == pytest.approx(4 * 32 / cell["predicted_ms_per_step"] * 1000)
    assert cell["predicted_cost"] == pytest.approx(2 * cell["predicted_hours"])
    assert cell["predicted_hours"] == pytest.approx(300 * cell["predicted_ms_per_step"] / 3.6e6)


def test_a_script_can_ask_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards.Card, "needed", lambda self, peak, ranks: 10**12)
    large = ["--gpu", "1GB", "--search-s", "1"]
    assert invoked(*large).exit_code == 0
    refused = invoked(*large, "--check")
    assert refused.exit_code == 1
    assert refused.stdout.startswith("does not fit: needs ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8xh100"], "add parallel=ddp or parallel=fsdp"),
        (["--gpus", "3xh100", "parallel=ddp"], "data.batch=4 rows do not divide over 3 ranks: use 3 or 6"),
        (["--gpus", "4xh100", "parallel=tp"], "model.attention.heads=2 does not divide by parallel.tp=4: use 1 or 2"),
        (["--gpus", "2xh100", "parallel=pp", "memory=stream"], "memory=stream cannot go with parallel.pp"),
        (["--gpu", "rtx9"], "is no card and no size such as 24GB; did you mean"),
    ],
)
def test_mistakes_are_said_before_anything_is_traced(words: list[str], said: str) -> None:
    result = invoked(*words)
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)
