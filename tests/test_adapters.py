"""Adapters: the same as their base at first, only they learn, and they become one model again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import SMALL
from tests.ranks import in_ranks
from trainkit import build, cli, merge
from trainkit import run as runs
from trainkit import start as starts
from trainkit.checkpoint import load
from trainkit.errors import UserError
from trainkit.learner import Learner
from trainkit.models.adapters import AdaptedLinear, Adapter, adapted
from trainkit.models.quantized import quantize
from trainkit.run import Run

KINDS = ["lora", "dora", "qlora"]
ON_BASE = ["start_from=base", "model.adapter.rank=3"]
WIDE = ["model.attention.heads=2", "model.bias=true", "model.norm=layernorm"]  # biases are where exactness is lost


@pytest.fixture
def base(trained: Callable[..., build.Trainer]) -> Learner:
    """A trained run named `base`."""
    return trained(*WIDE, "optimizer.lr=0.01", name="base").learner


def begun(*overrides: str, name: str = "t") -> Learner:
    """The learner of a run that has its base's weights and has not begun."""
    run = runs.composed([*SMALL, *WIDE, *ON_BASE, *overrides, f"name={name}"])
    with build.trainer(run, Path("runs") / name) as trainer:
        return trainer.learner


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20) % 256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_at_first_it_is_its_base_to_the_bit(base: Learner, kind: str, precision: str) -> None:
    ours = begun(f"model.adapter={kind}", f"precision={precision}")
    run = runs.composed([*SMALL, *WIDE, "name=p", f"precision={precision}"])
    plain = run.task.build(run.model.build())
    plain.load_state_dict(base.model.state_dict())
    if kind == "qlora":
        if precision == "fp64":
            plain.double()
        quantize(plain, "nf4")
    plain = run.precision.apply(plain, torch.device("cpu"))
    if kind == "qlora":  # doubly quantized is not to the bit what singly quantized is
        ours = begun("model.adapter=lora", "model.adapter.quantize=nf4", f"precision={precision}", name="q")
    assert torch.equal(logits(ours.model), logits(plain))


def reference(layer: AdaptedLinear, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None) -> Tensor:
    """The papers' formulas, in one expression each."""
    weight = layer.whole(torch.float64) + layer.scale * b @ a
    if magnitude is not None:
        weight = magnitude[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    return F.linear(x, weight, layer.bias)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("form", [None, "int8", "int4", "nf4"])
def test_gradients_are_those_of_the_formula(kind: str, form: str | None) -> None:
    torch.manual_seed(0)
    cfg = Adapter(kind=kind, rank=3, alpha=7.0, quantize=form)  # type: ignore[arg-type]
    layer = AdaptedLinear(nn.Linear(12, 10), cfg).double()
    assert layer.scale == 7 / 3
    nn.init.normal_(layer.lora_b)
    learned = [layer.lora_a, layer.lora_b, *([] if layer.magnitude is None else [layer.magnitude])]
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    toward = torch.randn(5, 10, dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * toward).sum(), [x, *learned])
    copies = [t.detach().clone().requires_grad_() for t in (x, *learned)]
    y = reference(layer, *copies[:3], copies[3] if len(copies) == 4 else None)
    expected = torch.autograd.grad((y * toward).sum(), copies)
    torch.testing.assert_close(layer(x), y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not {id(p) for p in layer.parameters() if p.requires_grad} ^ {id(p) for p in learned}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_learns_and_merging_changes_nothing(
    base: Learner, trained: Callable[..., build.Trainer], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [*WIDE, *ON_BASE, f"model.adapter={kind}", "optimizer.lr=0.02"]
    ours = trained(*how, name="tuned").learner
    start = begun(f"model.adapter={kind}", name="start").model.state_dict()
    changed = {k for k, v in ours.model.state_dict().items() if not torch.equal(v, start[k])}
    learned = {name for name, p in ours.model.named_parameters() if p.requires_grad}
    assert changed == learned
    assert {name.rpartition(".")[2] for name in learned} <= {"lora_a", "lora_b", "magnitude"}
    with_state = {name.rpartition(".")[0] for name in ours.tensors() if name.startswith("optimizer.")}
    assert with_state == {f"optimizer.{name}" for name in learned}

    merge.merge("tuned", "one", Path("runs"))
    loaded = load(next(Path("runs/one/checkpoints").iterdir()))
    run = runs.saved(loaded.files["run.yaml"])
    assert (run.model.adapter, run.start_from, run.start) == (None, None, None)
    plain = run.task.build(run.model.build())
    assert {k.removeprefix("model.") for k in loaded.tensors if k.startswith("model.")} == plain.state_dict().keys()
    plain.load_state_dict({k.removeprefix("model."): v for k, v in loaded.tensors.items() if k.startswith("model.")})
    torch.testing.assert_close(logits(plain), logits(ours.model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(plain), logits(base.model), rtol=1e-3, atol=1e-3)

    capsys.readouterr()
    losses = []
    for name in ("tuned", "one"):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", name, "--json"])
        losses.append(json.loads(capsys.readouterr().out)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(UserError, match=r"runs/one is there already: choose another --name"):
        merge.merge("tuned", "one", Path("runs"))
    with pytest.raises(UserError, match="has no adapter to merge"):
        merge.merge("one", "two", Path("runs"))


@pytest.mark.parametrize("kind", ["dora", "qlora"])
def test_a_run_goes_on_bitwise_when_its_base_is_gone(
    base: Learner, trained: Callable[..., build.Trainer], kind: str
) -> None:
    how = [*WIDE, *ON_BASE, f"model.adapter={kind}", "model.adapter.dropout=0.2"]
    whole = trained(*how, name="whole").learner
    trained(*how, "stop_at=3", name="parts")
    shutil.rmtree("runs/base")
    parts = trained(*how, name="parts").learner
    ours, theirs = parts.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.startswith("random."))


def test_the_base_of_a_run_is_what_it_was(base: Learner, trained: Callable[..., build.Trainer]) -> None:
    trained(*WIDE, "optimizer.lr=0.02", name="other")
    tuned = trained(*WIDE, "start_from=base", "model.adapter=lora", "stop_at=2", name="tuned")
    run = runs.read(Path("runs/tuned"))
    assert run is not None
    assert run.start is not None
    assert run.start.startswith("base/step-6@")
    with pytest.raises(
        UserError, match=r"the name 'tuned' is taken by another run \(start: other/step-6@.* here, base/step-6@"
    ):
        trained(*WIDE, "start_from=other", "model.adapter=lora", name="tuned")
    with pytest.raises(
        UserError, match="start_from=base is base/step-6@.* and the run began with elsewhere: give that"
    ):
        trained(*WIDE, "start_from=base", "start=elsewhere", "model.adapter=lora", name="tuned")
    assert trained(*WIDE, "start_from=base/step-6", "model.adapter=lora", name="tuned").learner.step == 6
    shutil.rmtree("runs/tuned/checkpoints")  # it never saved: then its base is needed, that very one
    words = runs.saved(run.yaml(), ["start_from=runs/base"])
    shutil.move("runs/base", "runs/moved")
    with pytest.raises(UserError, match="there is no checkpoint 'runs/base'"):
        begin(words)
    with pytest.raises(UserError, match=r"start_from=other is other/step-6@.* and the run began with base/step-6@"):
        begin(runs.saved(run.yaml(), ["start_from=other"]))
    moved = begin(runs.saved(run.yaml(), ["start_from=runs/moved"]))
    assert torch.equal(logits(moved.model), logits(base.model))
    assert tuned.learner.step == 2
    shutil.rmtree("runs/moved")
    shutil.copytree("runs/other", "runs/moved")  # the same words, and another checkpoint
    with pytest.raises(
        UserError, match="start_from=runs/moved is not base/step-6@.* any more, with which the run began"
    ):
        begin(runs.saved(run.yaml(), ["start_from=runs/moved"]))


def begin(run: Run) -> Learner:
    with build.trainer(run, Path("runs/tuned")) as trainer:
        return trainer.learner


def test_a_whole_model_starts_from_another_runs(base: Learner, trained: Callable[..., build.Trainer]) -> None:
    run = runs.composed([*SMALL, *WIDE, "start_from=base/best", "precision=bf16_pure", "name=ft"])
    with build.trainer(run, Path("runs/ft")) as trainer:
        for name, tensor in trainer.learner.model.state_dict().items():
            assert torch.equal(tensor, base.model.state_dict()[name].bfloat16())
        assert trainer.learner.step == 0
        assert not trainer.learner.optimizer.state


def test_what_cannot_be_a_base_is_refused(base: Learner, trained: Callable[..., build.Trainer]) -> None:
    def refused(*how: str, name: str = "x") -> str:
        with pytest.raises(UserError) as told:
            trained(*how, name=name)
        return str(told.value)

    other = refused(*WIDE, "start_from=base", "model.attention.heads=4")
    assert other == "start_from=base is another model; give this run model.attention.heads=2"
    assert "model.mlp.activation=relu2" in refused(*WIDE, "start_from=base", "model.mlp.activation=gelu")
    tokens = refused(*WIDE, "start_from=base", "data.tokenizer.kind=bpe", "data.tokenizer.vocab=280")
    assert "reads the tokens of bytes" in tokens
    assert "data.tokenizer=" in tokens
    trained(*WIDE, *ON_BASE, "model.adapter=lora", "steps=3", name="tuned")
    assert "holds an adapter: make one model of it first, trainkit checkpoint merge" in refused(
        *WIDE, "start_from=tuned"
    )
    assert "there is no checkpoint 'bse'" in refused("start_from=bse")
    (path,) = Path("runs/base/checkpoints").iterdir()
    shard = next(path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(build.DamagedError, match=r"is not good: .* give another start_from"):
        trained(*WIDE, "start_from=base", name="y")


def test_words_that_are_wrong_are_answered() -> None:
    for words, said in (
        (["model.adapter=lara", "start_from=b"], "model.adapter has no choice 'lara'; did you mean 'lora'"),
        (["model.adapter=zzz", "start_from=b"], "model.adapter has no choice 'zzz'; choices: dora, lora, qlora"),
        (["model.adapter=lora"], r"name its checkpoint, start_from=CHECKPOINT"),
        (["model.adapter=lora", "start_from=b", "model.adapter.targets=heads"], "targets=heads is not a choice"),
        (["model.adapter=lora", "start_from=b", "model.adapter.rank=0"], "model.adapter.rank=0"),
        (
            ["model.adapter=lora", "start_from=b", "model.adapter.double_quantize=true"],
            "needs model.adapter.quantize=nf4",
        ),
    ):
        with pytest.raises(UserError, match=said):
            runs.composed(words)
    run = runs.composed(["model.adapter=lora", "start_from=b", "model.adapter.rank=4"])
    assert (run.model.adapter.rank, run.name) == (4, "tiny-moby-dick-lora")
    assert runs.composed(["model.adapter=null"]).model.adapter is None
    assert runs.composed(["model/adapter=dora", "start_from=b"]).model.adapter.kind == "dora"


@pytest.mark.parametrize(("targets", "count"), [("all", 4), ("attention", 2), ("mlp", 2)])
def test_targets(learner: Callable[..., Learner], targets: str, count: int) -> None:
    it = learner("model.adapter=dora", *ON_BASE, f"model.adapter.targets={targets}")
    layers = dict(adapted(it.model))
    assert len(layers) == 2 * count
    assert all(targets in (name.split(".")[-2], "all") for name in layers)
    adapter = it.task and runs.composed([*SMALL, "model.adapter=dora", *ON_BASE, "name=t"]).model.adapter
    expected = sum(adapter.trained(layer.lora_a.shape[1], layer.lora_b.shape[0]) for layer in layers.values())
    assert sum(p.numel() for p in it.parameters) == expected


def test_a_base_in_four_bits_takes_less() -> None:
    def taken(kind: str) -> int:
        model = runs.composed([f"model.adapter={kind}", "start_from=b"]).model.build()
        return sum(p.nbytes for p in model.parameters())

    assert taken("qlora") < 0.4 * taken("lora")


@pytest.mark.parametrize("kind", KINDS)
def test_memory_strategies_are_bitwise_neutral(learner: Callable[..., Learner], kind: str) -> None:
    def learned(*how: str) -> dict[str, Tensor]:
        it = learner(f"model.adapter={kind}", *ON_BASE, "model.adapter.dropout=0.3", "precision=bf16", *how)
        for _ in range(3):
            it.train_step()
        return it.model.state_dict()

    plain, other = learned(), learned("memory=checkpoint+offload_activations")
    assert all(torch.equal(plain[k], other[k]) for k in plain)


PLAIN = ["precision=fp64", "optimizer=sgd", "clip=0.5", *WIDE, *ON_BASE]


def on_two_ranks(way: str, expected: dict[str, dict[str, Tensor]]) -> None:
    ranks = None
    for kind, weights in expected.items():
        run = runs.composed([*SMALL, *PLAIN, f"model.adapter={kind}", f"parallel={way}", "name=two"])
        ranks = ranks or build.ranks(run)
        corpus = run.data.open()
        it = build.learner(run, corpus, ranks)
        starts.load(run, it, corpus.tokenizer, Path("runs"))
        for _ in range(3):
            it.train_step()
        for name, tensor in it.model.state_dict().items():
            whole = ranks.whole(tensor)
            if whole.is_floating_point():
                torch.testing.assert_close(whole, weights[name], rtol=1e-9, atol=1e-12)
            else:
                assert torch.equal(whole, weights[name])
        assert ranks.kind == way
    ranks.leave()


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_learns(base: Learner, way: str) -> None:
    expected = {}
    for kind in ("dora", "qlora"):
        it = begun(*PLAIN, f"model.adapter={kind}", name=f"{kind}-1")
        for _ in range(3):
            it.train_step()
        expected[kind] = {name: t.detach().clone() for name, t in it.model.state_dict().items()}
    in_ranks(2, on_two_ranks, way, expected)
