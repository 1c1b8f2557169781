"""Adapters in PEFT's folders: what we write PEFT reads, what PEFT writes we read, with the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.hf_models import begun, folder, ids, made
from trainkit import build
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.export import export
from trainkit.hf import peft as format_
from trainkit.learner import load_model
from trainkit.opened import opened

peft = pytest.importorskip("peft", reason="the peft library is not installed")
RUNS = Path("runs")


def ours(which: str) -> nn.Module:
    loaded, run = opened(which, RUNS)
    model = run.task.build(run.model.build())
    load_model(model, loaded.tensors)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize(
    ("kind", "adapter"), [("qwen2", "lora"), ("llama", "dora"), ("gpt2", "lora"), ("llama-bias", "lora")]
)
def test_peft_reads_ours_and_so_do_we(kind: str, adapter: str, place: Path) -> None:
    words = [f"model.adapter={adapter}", "model.adapter.rank=3", "optimizer.lr=0.02"]
    begun(kind, place, *words)
    run = runs.read(RUNS / "t")
    assert run is not None
    with build.trainer(run, RUNS / "t") as trainer:
        trainer.fit()
    model = trainer.learner.model.eval()
    export("t", place / "out", RUNS, dtype="fp32", adapter=True)
    theirs = peft.PeftModel.from_pretrained(made(kind), place / "out").eval()
    expected = model(ids())
    torch.testing.assert_close(theirs(ids()).logits, expected, rtol=0, atol=5e-4)
    assert not torch.allclose(made(kind)(ids()).logits, expected, atol=1e-2)
    again = ours(f"hf:{place / 'out'}")
    torch.testing.assert_close(again(ids()), expected, rtol=0, atol=5e-4)
    _, resolved = opened(f"hf:{place / 'out'}", RUNS)
    assert resolved.model.adapter == run.model.adapter  # of the same rank: the three share their first factor
    with pytest.raises(UserError, match="is there already"):
        export("t", place / "out", RUNS, dtype="fp32", adapter=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen3", {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": ["gate_proj", "down_proj"], "lora_dropout": 0.1}),
        ("llama", {"target_modules": "all-linear", "use_dora": True}),
    ],
)
def test_we_read_what_peft_writes(kind: str, how: dict[str, Any], place: Path) -> None:
    where = folder(kind, place)
    cfg = peft.LoraConfig(r=2, lora_alpha=5, task_type="CAUSAL_LM", **how)
    theirs = peft.get_peft_model(made(kind), cfg).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, mean=float("magnitude" in name))
    theirs.peft_config["default"].base_model_name_or_path = str(where)
    theirs.save_pretrained(place / "theirs")
    torch.testing.assert_close(ours(f"hf:{place / 'theirs'}")(ids()), theirs(ids()).logits, rtol=0, atol=1e-3)
    small = ["data=text", "data.path=corpus", "data.length=32", "data.batch=4", "data.validation=0.2", "steps=8"]
    words = ["model=hf", f"model.name={place / 'theirs'}", "schedule.warmup=2", "tracking=jsonl"]
    run = runs.composed([*small, *words, "evaluation=end", "name=on"])
    with build.trainer(run, RUNS / "on") as trainer:
        torch.testing.assert_close(trainer.learner.model.eval()(ids()), theirs(ids()).logits, rtol=0, atol=1e-3)
        before = float(trainer.learner.train_step()["loss"])
        assert before > 0
    again = runs.read(RUNS / "on")
    assert again is not None
    assert again.start is not None
    assert again.start.startswith("hf:theirs@")


def test_what_is_no_adapter_of_ours(place: Path) -> None:
    for text, message in [
        ('{"peft_type": "IA3"}', "is no LoRA or DoRA adapter"),
        ('{"peft_type": "LORA", "r": 2, "bias": "all"}', "has bias=all"),
        ('{"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"]}', "has modules_to_save"),
        ("{", "cannot be read"),
    ]:
        (place / format_.CONFIG).write_text(text)
        with pytest.raises(UserError, match=message):
            format_.config_of(place)
    (place / format_.CONFIG).write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(UserError, match="does not say which model it is beside"):
        runs.composed(["model=hf", f"model.name={place}"])
    with pytest.raises(UserError, match=r"holds no adapter_model.safetensors: save the adapter as safetensors"):
        format_.tensors(place)
    begun("llama", place)
    with pytest.raises(UserError, match="no good checkpoint|there is no|t has none|no checkpoint"):
        export("t", place / "out", RUNS, dtype="fp32", adapter=True)
