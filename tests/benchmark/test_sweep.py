"""From words to cells, and what is refused before anything runs."""

from pathlib import Path

import pytest

from trainkit.benchmark import suites
from trainkit.benchmark.command import completing
from trainkit.benchmark.sweep import experiment, values
from trainkit.choices import CONF
from trainkit.cli_options import complete
from trainkit.errors import UserError


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("memory=baseline,checkpoint", ["memory=baseline", "memory=checkpoint"]),
        ("memory=checkpoint+offload_activations", ["memory=checkpoint+offload_activations"]),
        ("memory=[a,b],c", ["memory=[a,b]", "memory=c"]),
        ("a={x:1,y:[2,3]},'p,q',\"r,s\"", ["a={x:1,y:[2,3]}", "a='p,q'", 'a="r,s"']),
        ("data.batch=8, 16", ["data.batch=8", "data.batch=16"]),
        ("+a.b=1,2", ["+a.b=1", "+a.b=2"]),
        ("a=(1,2)", ["a=(1,2)"]),
        ("data.path=", ["data.path="]),
        ("~tracking", ["~tracking"]),
        ("notify=['it\\'s,',b]", ["notify=['it\\'s,',b]"]),
    ],
)
def test_commas_sweep_where_nothing_encloses_them(word: str, expected: list[str]) -> None:
    assert values(word) == expected


@pytest.mark.parametrize("word", ["memory=a,", "memory=,a", "memory=a,,b", "memory=,"])
def test_a_comma_with_nothing_beside_it(word: str) -> None:
    with pytest.raises(UserError, match="comma with nothing beside it"):
        values(word)


def test_cells_are_the_product_the_last_sweep_fastest() -> None:
    cells = experiment(["memory=baseline,checkpoint", "model=tiny", "data.batch=8,16"]).cells
    assert [cell.overrides for cell in cells] == [
        ("memory=baseline", "model=tiny", "data.batch=8"),
        ("memory=baseline", "model=tiny", "data.batch=16"),
        ("memory=checkpoint", "model=tiny", "data.batch=8"),
        ("memory=checkpoint", "model=tiny", "data.batch=16"),
    ]
    names = ["baseline · batch=8", "baseline · batch=16", "checkpoint · batch=8", "checkpoint · batch=16"]
    assert [cell.name for cell in cells] == names
    assert [cell.memory for cell in cells] == ["baseline", "baseline", "checkpoint", "checkpoint"]
    assert [cell.run.data.batch for cell in cells if cell.run] == [8, 16, 8, 16]
    assert [bool(cell.run.memory.checkpoint) for cell in cells if cell.run] == [False, False, True, True]


def test_zipped_sweeps_go_side_by_side() -> None:
    words = ["memory=baseline,checkpoint", "data.batch=8,16", "model=tiny"]
    cells = experiment(words, zipped=True).cells
    assert [cell.overrides[:2] for cell in cells] == [
        ("memory=baseline", "data.batch=8"),
        ("memory=checkpoint", "data.batch=16"),
    ]
    with pytest.raises(UserError, match=r"memory=baseline,checkpoint has 2, seed=1,2,3 has 3"):
        experiment(["memory=baseline,checkpoint", "seed=1,2,3"], zipped=True)


def test_without_a_sweep_there_is_one_cell() -> None:
    for zipped in (False, True):
        (cell,) = experiment(["model=tiny"], zipped=zipped).cells
        assert (cell.swept, cell.name, cell.memory) == ((), "the run", "fused_loss where logits are large (reordered)")


def test_strategies_have_the_name_that_was_given_or_that_they_have() -> None:
    words = ["memory=[checkpoint,offload_activations],checkpoint+offload_activations"]
    assert {cell.memory for cell in experiment(words).cells} == {"checkpoint+offload_activations"}
    (cell,) = experiment(["memory=baseline+checkpoint"]).cells
    assert cell.memory == "checkpoint"
    (cell,) = experiment(["memory.checkpoint.every=2"]).cells
    assert cell.run is not None
    assert cell.memory == cell.run.memory.describe()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["memory=baseline,chekpoint"], "memory has no choice 'chekpoint'; did you mean 'checkpoint'?"),
        (["memory=baseline,checkpoint", "data.bach=8"], "'data.bach' is not a key of a run; did you mean 'data.batch'"),
        (["data.batch=8,many"], "data.batch=many: input should be a valid integer"),
        (["data.batch=8,0"], "data.batch=0: input should be greater than or equal to 1"),
        (["nonsense"], "'nonsense' is not an override"),
        (["data.length=100000,200000"], "data.length=100000 is longer than model.context"),
    ],
)
def test_a_wrong_word_in_any_cell_is_an_error(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as found:
        experiment(words)
    assert said in str(found.value)


def test_what_a_rule_refuses_is_a_cell_with_the_reason() -> None:
    cells = experiment(["precision=bf16,fp64", "precision.compute=bfloat16"]).cells
    assert cells[0].run is not None
    assert cells[1].run is None
    assert "float64 computes in float64" in str(cells[1].refusal)


def test_a_lenient_sweep_keeps_cells_that_are_not_known_here() -> None:
    cells = experiment(["memory=baseline,tomorrow"], lenient=True).cells
    assert [cell.run is None for cell in cells] == [False, True]
    assert "memory has no choice 'tomorrow'" in str(cells[1].refusal)
    with pytest.raises(UserError, match="no choice 'tomorrow'"):
        experiment(["memory=tomorrow,later"], lenient=True)


def test_a_person_sweeps_choices_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text((CONF / "model" / "tiny.yaml").read_text())
    assert len(experiment(["model=mine,tiny"], config_dir=tmp_path).cells) == 2


def test_the_seeds_suite_has_both_experiments() -> None:
    suite = suites.named("seeds")
    found = [experiment(list(words), title=title, lenient=True) for title, words in suite.experiments]
    strategies = ["baseline", "checkpoint", "8bit", "fused_loss", "checkpoint+8bit", "checkpoint+8bit+fused_loss"]
    assert [[cell.memory for cell in it.cells] for it in found] == [strategies, strategies]
    assert [cell.name for cell in found[0].cells] == strategies
    small, gpt2 = (it.cells[0].run for it in found)
    assert small is not None
    assert gpt2 is not None
    assert (small.data.batch, gpt2.data.batch) == (256, 32)
    assert gpt2.model.parameters() == 124_439_808
    assert (suite.settings.rounds, suite.settings.steps) == (1, 1)
    with pytest.raises(UserError, match="no suite 'seed'; did you mean 'seeds'"):
        suites.named("seed")


def test_the_last_of_several_choices_is_completed() -> None:
    finish = completing(complete)
    assert finish("mem") == ["memory="]
    assert finish("memory=check") == ["memory=checkpoint"]
    assert finish("memory=baseline,check") == ["memory=baseline,checkpoint"]
    assert "memory=a,checkpoint+offload_activations" in finish("memory=a,checkpoint+off")
