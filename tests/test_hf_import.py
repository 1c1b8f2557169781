"""Others' models as ours: logits, gradients and generation of every family against transformers, with random weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.hf_models import FOREIGN, KINDS, TEMPLATE, begun, ids, made
from trainkit import build, imports
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.hf import source, weights
from trainkit.hf.folder import write_tensors
from trainkit.models import Decoder, Foreign
from trainkit.models.quantized import FrozenLinear, linears
from trainkit.tasks.generate import generate


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind: str, place: Path) -> None:
    theirs, x = made(kind), ids()
    trainer = begun(kind, place)
    ours = trainer.learner.model
    assert isinstance(runs.read(Path("runs/t")).model, Decoder)  # type: ignore[union-attr]
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x), expected, rtol=0, atol=2e-4)
    labels = torch.where(x % 7 == 0, -100, x.roll(-1, 1))
    ours(x, labels).backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    norms = [torch.stack([p.grad.norm() for p in model.parameters()]).norm() for model in (ours.backbone, theirs)]
    assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-4)


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_our_decoder_cannot_be_is_trained_as_it_is(kind: str, place: Path) -> None:
    theirs, x = made(kind), ids()
    trainer = begun(kind, place)
    run = runs.read(Path("runs/t"))
    assert run is not None
    assert isinstance(run.model, Foreign)
    assert run.model.parameters() == sum(p.numel() for p in theirs.parameters())
    ours = trainer.learner.model
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-5)


def test_its_tokenizer_comes_along_and_a_resume_needs_no_source(place: Path) -> None:
    trainer = begun("llama", place)
    run = runs.read(Path("runs/t"))
    assert run is not None
    assert run.start_from == f"hf:{place / 'llama'}"
    assert run.start == source.identity(place / "llama")
    assert run.data.tokenizer.kind == "hf"
    first = trainer.learner.model.state_dict()
    with build.trainer(run, Path("runs/t")) as whole:
        whole.fit()
    tokenizer = json.loads(next(Path("runs/t/checkpoints").iterdir()).joinpath("tokenizer.json").read_bytes())
    assert tokenizer["words"] == {"eos": "<|im_end|>", "bos": "<|im_start|>", "template": TEMPLATE}
    shutil.rmtree(place / "llama")
    again = runs.saved(run.yaml())
    with build.trainer(again, Path("runs/t")) as resumed:
        assert resumed.learner.step == 6
        for name, tensor in resumed.learner.model.state_dict().items():
            assert torch.equal(tensor, whole.learner.model.state_dict()[name])
            assert not torch.equal(tensor, first[name])


def test_another_source_under_the_same_name_is_another_run(place: Path) -> None:
    begun("llama", place)
    run = runs.read(Path("runs/t"))
    assert run is not None
    with weights.opened(place / "llama") as given:
        state = {name: given.get(name) for name in given}
    state["model.norm.weight"][0] += 1
    write_tensors(place / "llama", state)
    Path("runs/t/run.yaml").unlink()
    with pytest.raises(UserError, match=r"start_from=hf:.* is hf:llama@\w+, and the run began with hf:llama@"):
        imports.identified(run)


def test_a_model_may_begin_untrained(place: Path) -> None:
    trainer = begun("llama", place, "model.pretrained=false", "model.context=128")
    run = runs.read(Path("runs/t"))
    assert run is not None
    assert (run.start_from, run.start, run.model.context) == (None, None, 128)
    assert not torch.allclose(trainer.learner.model(ids()), made("llama")(ids()).logits)


@pytest.mark.parametrize("adapter", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("kind", ["qwen2", "llama-bias"])
def test_adapters_beside_it_begin_as_it_is(adapter: str, kind: str, place: Path) -> None:
    trainer = begun(kind, place, f"model.adapter={adapter}")
    ours, theirs = trainer.learner.model, made(kind)
    if adapter == "qlora":
        blocks = theirs.model.layers  # type: ignore[union-attr]
        for parent, name, linear in linears(blocks):
            plain = nn.Linear(*reversed(linear.weight.shape), bias=linear.bias is not None)
            whole = FrozenLinear(linear, "nf4", double=True).whole(torch.float32)
            plain.weight = nn.Parameter(whole)
            plain.bias = linear.bias
            setattr(parent, name, plain)
    if adapter == "qlora" and kind == "qwen2":
        return  # what is quantized together has other blocks: only that it runs is known
    torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=0, atol=2e-4)
    trainer.learner.train_step()
    learned = {name.rpartition(".")[2] for name, p in ours.named_parameters() if p.requires_grad}
    assert learned <= {"lora_a", "lora_b", "magnitude"}


@pytest.mark.parametrize("kind", ["mistral", "qwen2-window", "gemma", "yarn"])
def test_it_writes_what_transformers_writes(kind: str, place: Path) -> None:
    trainer, theirs = begun(kind, place), made(kind)
    prompt = ids(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)  # type: ignore[operator]
    found = list(generate(trainer.learner.model, prompt[0].tolist(), tokens=20, context=64, temperature=0))
    assert found == expected[0, 9:].tolist()


def test_documents_of_one_row_are_apart_in_others_models_too(place: Path) -> None:
    model = begun("gemma", place).learner.model.eval()
    x = ids(1, 20)
    documents = (torch.arange(20) >= 8).int()[None]
    changed = torch.where(documents == 0, (x + 1) % 250, x)
    with torch.no_grad():
        one, other = model(x, documents=documents), model(changed, documents=documents)
        alone = model(x[:, 8:])
    torch.testing.assert_close(one[:, 8:], other[:, 8:], rtol=0, atol=0)
    torch.testing.assert_close(one[:, 8:], alone, rtol=0, atol=1e-5)


STRATEGIES = ["memory=checkpoint", "memory=offload_activations", "memory=8bit", "memory.microbatch=1"]


@pytest.mark.parametrize("how", STRATEGIES)
def test_strategies_are_neutral_over_others_models(how: str, place: Path) -> None:
    losses = []
    for words in ([], [how]):
        shutil.rmtree("runs", ignore_errors=True)
        shutil.rmtree(place / "gemma", ignore_errors=True)
        learner = begun("gemma", place, "optimizer=sgd", *words).learner
        losses.append([float(learner.train_step()["loss"]) for _ in range(3)])
    assert losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
