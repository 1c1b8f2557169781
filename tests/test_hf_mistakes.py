"""What can be wrong with a model of someone else's, each said in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.hf_models import begun, folder
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.hf import weights
from trainkit.hf.folder import write_tensors
from trainkit.opened import opened

MISTAKES: list[tuple[dict[str, str], list[str], str]] = [
    ({}, ["model.name=null"], "model.name is missing"),
    ({}, ["model.name=corpus"], "corpus is no model's folder: it holds no config.json"),
    ({}, ["model.name=no where"], "is no folder with a config.json, no GGUF file and no OWNER/MODEL"),
    ({}, ["model.name=a.gguf"], "there is no a.gguf"),
    ({}, ["model.width=8"], "model.width is what there says itself"),
    ({"config.json": '{"model_type": "llama", "quantization_config": {}}'}, [], "holds quantized weights"),
    ({"config.json": "{"}, [], "config.json cannot be read"),
    ({"config.json": "[1]"}, [], "names no model_type"),
]


@pytest.mark.parametrize(("files", "overrides", "message"), MISTAKES)
def test_mistakes_in_what_is_named(files: dict[str, str], overrides: list[str], message: str, place: Path) -> None:
    (place / "there").mkdir()
    (place / "there/config.json").write_text((Path(__file__).parent / "llama/config.json").read_text())
    for name, text in files.items():
        (place / "there" / name).write_text(text)
    with pytest.raises(UserError, match=message):
        runs.composed(["model=hf", "model.name=there", *overrides])


def damaged(place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    where = folder("llama", place)
    with weights.opened(where) as given:
        state = {name: given.get(name) for name in given}
    change(state)
    write_tensors(where, state)
    return where


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.norm.weight"), "has no tensor model.norm.weight, which its config speaks of"),
        (
            lambda s: s.update({"model.layers.0.extra.bias": torch.ones(2)}),
            "a tensor model.layers.0.extra.bias, of which",
        ),
        (lambda s: s.update({"model.norm.weight": torch.ones(8)}), r"norm.weight is \(8,\) in the model that is read"),
    ],
)
def test_weights_that_are_not_what_the_config_says(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, place: Path
) -> None:
    with pytest.raises(UserError, match=message):
        opened(f"hf:{damaged(place, change)}", Path("runs"))


def test_pickles_are_refused_and_so_is_a_torn_file(place: Path) -> None:
    where = folder("llama", place)
    content = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(content[:100])
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        opened(f"hf:{where}", Path("runs"))
    (where / "model.safetensors").rename(where / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin only, which could run code when .*save_pretrained"):
        opened(f"hf:{where}", Path("runs"))
    (where / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no model.safetensors and no"):
        opened(f"hf:{where}", Path("runs"))
    (where / weights.INDEX).write_text('{"weight_map": {"a": "../elsewhere"}}')
    with pytest.raises(UserError, match="names '../elsewhere', and there is no such file"):
        opened(f"hf:{where}", Path("runs"))


def test_other_ids_are_refused(place: Path) -> None:
    with pytest.raises(UserError, match="reads the tokens of its own tokenizer and this data has bytes"):
        begun("llama", place, "data.tokenizer.kind=bytes")


def test_a_bare_models_names_do(place: Path) -> None:
    where = folder("gpt2", place)
    with weights.opened(where) as given:
        state = {name.removeprefix("transformer."): given.get(name) for name in given}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # the causal mask, as old files carry it
    write_tensors(where, state)
    loaded, run = opened(f"hf:{where}", Path("runs"))
    assert set(loaded.tensors) == {f"model.backbone.{name}" for name in run.model.build().state_dict()}
