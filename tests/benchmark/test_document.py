"""Figures from rounds, against sums done by hand; and an earlier benchmark beside this one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.benchmark.made_up import MIB, cells, found, made_up, usual
from trainkit.benchmark import against, words
from trainkit.benchmark.document import document
from trainkit.benchmark.rounds import Settings
from trainkit.errors import UserError

CONTRACT = {
    *("overrides", "memory", "tokens_per_s", "ms_per_step", "peak_memory_bytes", "memory_by_category", "loss"),
    "status",
}


def test_figures_are_medians_with_their_spread() -> None:
    (cell,) = made_up([found(2.0), found(4.0, None), found(8.0, None)])["cells"]
    assert (cell["tokens_per_s"], cell["tokens_per_s_min"], cell["tokens_per_s_max"]) == (1000, 500, 2000)
    assert cell["tokens_per_s_mad"] == 500  # distances 1000, 0, 500
    assert (cell["ms_per_step"], cell["ms_per_step_min"], cell["ms_per_step_max"]) == (1000, 500, 2000)
    assert cell["mfu"] == 0.5  # 1000 tokens a second at 6 FLOPs, of 12,000
    assert cell["updates"] == 5
    assert (cell["loss"], cell["losses"]) == (5.0, [6.0, 5.0])
    assert cell["peak_memory_bytes"] == 100 * MIB
    assert cell["peak_rss_growth_bytes"] == 123 * MIB
    assert cell["strategies"] == "fused_loss where logits are large (reordered)"
    assert [each["ms_per_step"] for each in cell["rounds"]] == [500, 1000, 2000]


def test_a_cell_of_several_ranks_is_held_against_all_their_devices() -> None:
    (cell,) = made_up([found(2.0, ranks=2)])["cells"]
    assert cell["mfu"] == 0.5


def test_cells_are_compared_with_the_first_round_by_round() -> None:
    slowing = [found(2.0), found(20.0, None), found(4.0, None)]
    other = [found(1.0, 25 * MIB, 4.5), found(5.0, None), found(8.0, None)]
    first, second = made_up(slowing, other)["cells"]
    assert (first["speed"], first["memory_change"], first["loss_difference"]) == (1, 0, 0)
    assert second["speed"] == 2.0  # of the ratios 2, 4 and 0.5; of the medians it would be 0.8
    assert second["memory_change"] == -0.75
    assert second["loss_difference"] == -0.5


def test_each_experiment_has_a_first_cell_of_its_own() -> None:
    one, two = cells([found(1.0)], title="one"), cells([found(4.0)], [found(2.0)], title="two")
    made = document([*one, *two], Settings(rounds=1), command="")
    assert [cell["speed"] for cell in made["cells"]] == [1, 1, 2]
    assert [(title, len(found)) for title, found in words.experiments(made)] == [("one", 1), ("two", 2)]


def test_what_did_not_end_well_says_so_and_keeps_what_it_found() -> None:
    late = [found(2.0), {"status": "oom", "error": "no room", "log": ["a", "b"]}]
    first, second, third = made_up(late, [], [{"status": "failed", "error": "a shame"}])["cells"]
    assert (first["status"], first["error"], first["log"]) == ("oom", "no room", ["a", "b"])
    assert first["tokens_per_s"] == 2000
    assert (second["status"], second["error"], second["tokens_per_s"]) == ("refused", "cannot be", None)
    assert (third["status"], third["error"], third["peak_memory_bytes"]) == ("failed", "a shame", None)
    assert all(set(cell) >= CONTRACT and set(cell) == set(first) for cell in (second, third))


def test_a_cell_that_never_had_its_turn_did_not_end_well() -> None:
    measured = cells([found()], [found()])
    measured[1].rounds.clear()
    (_, cell) = document(measured, Settings(rounds=1), command="")["cells"]
    assert (cell["status"], cell["error"]) == ("failed", "not run: stopped before its turn")


def test_a_loss_that_is_no_number_is_json_all_the_same() -> None:
    made = made_up([found()], [found(loss=math.nan)])
    again = json.loads(json.dumps(made, allow_nan=False))
    assert (again["cells"][1]["loss"], again["cells"][1]["loss_difference"]) == (None, None)
    assert again["cells"][1]["error"] == "the loss is nan"


def test_figures_as_people_read_them() -> None:
    first, second, third, *_ = usual()["cells"]
    tokens, speed, ms, mfu, peak, change, loss, difference, status = words.row(second)
    assert (tokens, speed, ms, mfu) == ("1,510 ±2%", "0.79×", "662", "75%")
    assert (peak, change, loss, difference, status) == ("40.0 MiB", "−60.0\N{NO-BREAK SPACE}%", "5.00000", "0", "ok")
    assert words.row(first)[5] == "same"
    assert set(words.row(third)[:-1]) == {words.NOTHING}
    assert words.difference(-1.14e-4) == "−1.1e−04"
    assert words.categories([second]) == ["parameters", "activations"]
    assert words.headline([first, second]).startswith(
        "checkpoint takes 60.0\N{NO-BREAK SPACE}% less memory than baseline"
    )
    assert words.headline([first, third]) == ""
    said = words.measured(made_up([found()]))
    assert said.startswith("one round, every cell in a fresh process: 1 step of warm-up, 4 steps timed. Peak memory is")
    assert "after 5 identical updates." in said
    assert words.measured(usual()).startswith("2 rounds in which the cells take turns")


def earlier(path: Path, made: dict[str, Any]) -> dict[str, Any]:
    path.write_text(json.dumps(made))
    return against.read(path)


def test_an_earlier_benchmark_stands_beside_this_one(tmp_path: Path) -> None:
    then = made_up([found(2.0, loss=5.0), found(2.1, None)], [found(2.0)], [found(2.0)], [found(2.0)])
    now = made_up(
        [found(2.2, 102 * MIB, loss=5.001), found(2.3, None)],
        [{"status": "oom", "error": "no room"}],
        names=["memory=0", "memory=1"],
    )
    against.compare(now, earlier(tmp_path / "then.json", then))
    first, second = (cell["against"] for cell in now["cells"])
    assert first["speed"] == pytest.approx((4000 / 2.2 + 4000 / 2.3) / (4000 / 2.0 + 4000 / 2.1))
    assert first["memory"] == 1.02
    assert first["worse"] == ["speed", "memory", "loss"]
    assert (second["speed"], second["worse"]) == (None, ["status"])
    assert now["against"]["missing"] == [["memory=2"], ["memory=3"]]
    assert not now["against"]["elsewhere"]
    assert words.against(now["cells"][0]) == ("0.91×", "1.02×", "+1.0e−03", "slower, more memory, another loss")
    assert "2 of its cells are not here" in words.against_what(now)


def test_what_lies_within_the_spread_is_not_worse(tmp_path: Path) -> None:
    then = made_up([found(2.0), found(2.4, None)], [found(2.0)])
    now = made_up([found(2.3, 100 * MIB + 1000), found(2.5, None)], [found(9.0)], [found(2.0)])
    then["environment"]["torch"] = "0.1"
    against.compare(now, earlier(tmp_path / "then.json", then))
    first, second, third = now["cells"]
    assert first["against"]["worse"] == []
    assert second["against"]["worse"] == []  # one round has no spread to be beyond of
    assert "against" not in third
    assert words.against(third) is None
    assert "not this machine" in words.against_what(now)


def test_words_in_another_order_are_the_same_cell(tmp_path: Path) -> None:
    then, now = made_up([found(2.0)]), made_up([found(2.0)])
    then["cells"][0]["overrides"], now["cells"][0]["overrides"] = ["a=1", "b=2"], ["b=2", "a=1"]
    against.compare(now, earlier(tmp_path / "then.json", then))
    assert now["cells"][0]["against"]["speed"] == 1


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"cells": {}}', '{"cells": [1]}', '{"cells": [{"overrides": []}]}', '{"cells": [], "cells": []}'],
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="--against"):
        against.read(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"--against .*missing.json cannot be read"):
        against.read(tmp_path / "missing.json")


@pytest.mark.parametrize("change", [{"loss": "5"}, {"rounds": None}, {"overrides": [1]}, {"tokens_per_s": [1]}])
def test_a_cell_of_the_wrong_types_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    made = made_up([found(2.0)])
    made["cells"][0] |= change
    with pytest.raises(UserError, match="is not what `trainkit benchmark --json FILE` writes"):
        earlier(tmp_path / "x.json", made)
