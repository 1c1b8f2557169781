"""Folders of vectors that are not read, and what a person may say of those that are."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.hf_vectors import folder
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.opened import opened

RUNS = Path("runs")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: (w / "1_Pooling/config.json").write_text('{"pooling_mode": "max"}'), "pools by max: what is known"),
        (lambda w: (w / "modules.json").write_text('[{"type": "x.LSTM", "path": ""}]'), "makes vectors by LSTM"),
        (lambda w: (w / "modules.json").write_text("[3]"), "no list of modules"),
        (lambda w: (w / "2_Dense/config.json").write_text('{"out_features": 3}'), "more than a matrix"),
        (lambda w: (w / "2_Dense/model.safetensors").unlink(), "holds no model.safetensors"),
        (
            lambda w: (
                (w / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
                and (w / "tokenizer.json").write_text(words_in_capitals(w))
            ),
            "makes texts lower-case",
        ),
    ],
)
def test_what_is_not_known_is_refused(change: Any, said: str, place: Path) -> None:
    where = folder("bert", place, dense=6)
    change(where)
    with pytest.raises(UserError, match=said):
        opened(f"hf:{where}", RUNS)


@pytest.mark.parametrize(
    "change",
    [
        {"bias": None},
        {"bias": True},
        {"activation_function": "torch.nn.modules.activation.Tanh"},
        {"use_residual": True},
    ],
)
def test_a_projection_that_is_more_than_a_matrix_is_refused(change: dict[str, Any], place: Path) -> None:
    """Where nothing is said of a bias there is one."""
    where = folder("bert", place, dense=6)
    file = where / "2_Dense/config.json"
    said = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    with pytest.raises(UserError, match="more than a matrix"):
        opened(f"hf:{where}", RUNS)


def test_what_a_person_says_of_a_folder_of_vectors_holds(place: Path) -> None:
    words = ["task=embedding", "data=pairs", "data.path=pairs.tsv", "data.length=16", "model=hf"]
    words.append(f"model.name={folder('bert', place)}")
    own = runs.composed(words)
    said = runs.composed([*words, "task.pooling=last", "data.specials=end"])
    assert (own.task.pooling, own.data.specials) == ("mean", "template")  # type: ignore[union-attr]
    assert (said.task.pooling, said.data.specials) == ("last", "end")  # type: ignore[union-attr]


def test_an_encoder_of_another_family_is_refused(place: Path) -> None:
    where = folder("bert", place)
    said = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**said, "model_type": "mpnet"}))
    with pytest.raises(UserError, match="bert makes no vectors here: mpnet is none of llama, .*bert"):
        opened(f"hf:{where}", RUNS)


def words_in_capitals(where: Path) -> str:
    return (where / "tokenizer.json").read_text().replace('"lowercase":true', '"lowercase":false')
