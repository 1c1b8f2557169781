"""Whole runs of the embedding task: memory strategies, resuming with patience, the verbs, what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.plan import NO_SPEED
from tests.conftest import weights
from tests.ranks import in_ranks
from tests.short_runs import WORDS
from tests.test_embedding import IDS, LOSSES
from trainkit import build, embed, floors, say, use
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.opened import opened, tokenizer_of
from trainkit.plan.planned import Setting, plan
from trainkit.trainer import Trainer

SMALL = [
    *("task=embedding", "data=pairs", "data.path=pairs.jsonl", "data.length=12", "data.batch=8", "data.validation=0.2"),
    *("data.columns=[anchor,positive,negative]", "data.tokenizer.vocab=300", "model.vocab=320"),
    *("model.width=8", "model.depth=2", "model.attention.heads=2", "model.attention.causal=false", "model.context=64"),
    *("schedule.warmup=2", "steps=6", "tracking=jsonl", "tracking.every=1", "evaluation=end", "model.dropout=0.1"),
]
SCORED = ["data.score=score", "evaluation.metric=val_spearman", "evaluation.higher_is_better=true"]


@pytest.fixture(autouse=True)
def pairs(place: Path) -> None:
    write_pairs()


def write_pairs() -> None:
    draw = np.random.default_rng(0)
    lines = []
    for i in range(60):
        anchor, negative = (" ".join(draw.choice(WORDS.split(), 1 + i % 7)) for _ in range(2))
        row = {"anchor": anchor, "positive": f"{anchor} {draw.choice(WORDS.split())}", "score": float(i * 7 % 11)}
        lines.append(json.dumps({**row, "negative": negative if i % 4 else None}))
    Path("pairs.jsonl").write_text("\n".join(lines))
    np.save("teacher.npy", draw.normal(size=(60, 3, 8)).astype(np.float32))


def words_of(loss: dict[str, Any]) -> list[str]:
    words = [f"task.{k}={str(list(v)).replace(' ', '') if isinstance(v, tuple) else v}" for k, v in loss.items()]
    words += SCORED if loss["loss"] in ("cosent", "angle") else []
    return words + (["data.teacher=teacher.npy"] if loss["loss"] == "distill" else [])


def after(overrides: list[str], steps: int = 3) -> torch.Tensor:
    """The weights after some steps."""
    run = runs.composed([*SMALL, *overrides, "name=t"])
    ranks = build.ranks(run)
    it = build.learner(run, run.data.open(), ranks)
    for _ in range(steps):
        it.train_step()
    found = torch.cat([ranks.whole(p.detach()).flatten() for p in it.model.parameters()])
    ranks.leave()
    return found


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_memory_strategies_change_nothing(loss: dict[str, Any]) -> None:
    words = [*words_of(loss), "clip=0"]
    plain, few = after(words), after([*words, "memory.microbatch=3"])
    assert not torch.equal(plain, few)  # other masks are drawn
    for rows, expected in (("null", plain), ("3", few)):
        both = after([*words, "memory=checkpoint+offload_activations", f"memory.microbatch={rows}"])
        assert torch.equal(both, expected)
    assert torch.equal(after([*words, "memory=step_in_backward"]), plain)


@pytest.mark.parametrize("rows", ["null", "3"])
def test_more_memory_strategies_change_nothing(rows: str) -> None:
    plain = after([f"memory.microbatch={rows}"])
    for strategy in ("selective", "offload_optimizer", "stream"):
        assert torch.equal(after([f"memory={strategy}", f"memory.microbatch={rows}"]), plain), strategy


def of_ranks(kind: str, file: str) -> None:
    found = after(
        [f"parallel={kind}", "deterministic=elastic", "model.dropout=0.2", "optimizer=sgd", "optimizer.lr=0.1"]
    )
    torch.set_num_threads(1)
    Path(file).write_bytes(found.numpy().tobytes())


def test_elastic_runs_are_the_same_bits_on_any_number_of_ranks() -> None:
    of_ranks("single", "one")
    in_ranks(2, of_ranks, "ddp", "two")
    assert Path("one").read_bytes() == Path("two").read_bytes()


def fit(*overrides: str, name: str) -> tuple[Trainer, str]:
    run = runs.composed([*SMALL, *SCORED, "task.loss=cosent", *overrides, f"name={name}"])
    with build.trainer(run, Path("runs") / name) as trainer:
        return trainer, trainer.fit()


def test_a_run_that_was_stopped_ends_where_one_ends_that_was_not() -> None:
    """Bit for bit, and with what patience has seen. With so small a rate no evaluation is better than the first."""
    words = ["steps=40", "evaluation.every=2", "evaluation.patience=3", "optimizer.lr=1e-9", "checkpoint.every=5"]
    whole, end = fit(*words, name="whole")
    fit(*words, "stop_at=5", name="parts")
    parts, also = fit(*words, name="parts")
    assert end == also == "patience"
    assert whole.learner.step == parts.learner.step == 8
    assert whole.best == parts.best
    assert whole.best.step == 2
    assert torch.equal(weights(whole.learner), weights(parts.learner))
    other, _ = fit("steps=12", "evaluation.every=4", name="w")
    fit("steps=12", "evaluation.every=4", "stop_at=7", name="p")
    again, _ = fit("steps=12", "evaluation.every=4", name="p")
    assert torch.equal(weights(other.learner), weights(again.learner))
    assert other.best == again.best


def test_vectors_of_lines_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = fit("steps=3", "data.specials=template", "model.dropout=0", name="a")
    lines = ["the quick fox", "", "my box with five dozen liquor jugs and a lazy dog and more of it", "dog"]

    def written(**how: Any) -> np.ndarray[Any, Any]:
        out = io.BytesIO()
        words = {"prompt": "", "rows": 3, "width": None, "device": "cpu", "quantize": None, "root": Path("runs")} | how
        with monkeypatch.context() as patch, io.TextIOWrapper(out) as wrapped:
            patch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
            patch.setattr("sys.stdout", wrapped)
            embed.embed("a", **words)
            return np.lib.format.read_array(io.BytesIO(out.getvalue()), allow_pickle=False)

    found = written()
    model = trainer.learner.model.eval()
    loaded, _ = opened("a", Path("runs"))
    tokenizer = tokenizer_of(loaded)
    before, behind = tokenizer.template()
    for line, vector in zip(lines, found, strict=True):
        ids = [*before, *tokenizer.encode(line).tolist()[:10], *behind]
        expected = model(torch.tensor([ids]), torch.tensor([len(ids)])).detach()[0].numpy()
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
    narrow = written(width=4)
    np.testing.assert_allclose(narrow, found[:, :4] / np.linalg.norm(found[:, :4], axis=1, keepdims=True), rtol=1e-5)
    assert np.abs(written(quantize="int8") - found).max() < 0.1
    with pytest.raises(UserError, match="--width 9 is wider than the vectors, which have 8 numbers"):
        written(width=9)


def test_the_floor_before_learning_is_of_as_many_batches_as_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.composed([*SMALL, *SCORED, "task.loss=cosent", "data.batch=2", "name=t"])
    corpus = run.data.open()
    it = build.learner(run, corpus, build.ranks(run))
    monkeypatch.setattr(it, "evaluate", lambda batches, stop: {"val_spearman": len(list(batches))})
    whole = len(list(it.loader.validation()))
    assert whole > 1
    assert "as it begins 1.0," in str(floors.said(it, corpus, 1))
    assert f"as it begins {whole}.0," in str(floors.said(it, corpus, None))


def test_an_evaluation_stands_beside_its_floors(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = fit("steps=4", "evaluation.every=4", name="a")
    capsys.readouterr()
    use.evaluate("a", [], Path("runs"), quantize=None, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["val_spearman"] == pytest.approx(trainer.evaluated[1]["val_spearman"], rel=1e-9)
    assert found["untrained"]["val_spearman"] != found["val_spearman"]
    corpus = runs.composed([*SMALL, *SCORED, "task.loss=cosent", "name=a"]).data.open()
    assert found["idf_overlap"] == pytest.approx(floors.idf_overlap(corpus))
    use.evaluate("a", [], Path("runs"), quantize="int8", as_json=False)
    assert "untrained" in capsys.readouterr().out
    with pytest.raises(UserError, match="writes no text"):
        say.generate("a", "x", Path("runs"), prompts=None, talk=False, system=None, rows=1, device="cpu", quantize=None)
    with pytest.raises(UserError, match="learns from pairs, and data=text has text"):
        use.evaluate("a", ["data=moby-dick"], Path("runs"), quantize=None, as_json=True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=shards"], "task=embedding learns from pairs, and data=shards has text"),
        (
            ["task=causal_lm", "model.attention.causal=true"],
            "task=causal_lm learns from text, and data=pairs has pairs",
        ),
        (["task=mlm", "data=shards", "model.attention.causal=true"], "task=mlm guesses from both sides"),
        (["task=causal_lm", "data=shards"], "which model.attention.causal=false shows"),
        (["task.matryoshka=[16]"], "wider than the vectors, which have 8"),
        (["data.path=null"], "data.path is missing"),
        (["data.path=null", "data.columns=[]", "data.sources.a.weight=2"], "data.sources.a needs a path"),
        (["data.validation=0"], "evaluation.metric=val_loss needs pairs that the data does not hold out"),
        (["evaluation.metric=val_spearman"], "evaluation.metric=val_spearman needs pairs"),
        (["deterministic=elastic", "data.tokens=64"], "data.tokens must go"),
        (["data.teacher=nowhere.npy"], "data.teacher=nowhere.npy does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(overrides: list[str], said: str) -> None:
    others = "data=shards" in overrides
    base = [word for word in SMALL if not (others and word.startswith(("data", "model.context")))]
    with pytest.raises(UserError, match=said):
        build.check(runs.composed([*base, *overrides, "name=t"]))


def test_an_encoder_goes_on_from_what_it_guessed(trained: Any) -> None:
    """From masked language modelling to vectors: the backbone is taken, the task's own weights are new."""
    shape = [word for word in SMALL if word.startswith("model.")]
    before = trained("task=mlm", *shape, name="guesses").learner.model.state_dict()
    words = ["data.tokenizer.kind=bytes", "start_from=guesses", "task.projection=6", "task.learn_temperature=true"]
    run = runs.composed([*SMALL, *words, "evaluation=end", "name=vectors"])
    with build.trainer(run, Path("runs/vectors")) as trainer:
        after = trainer.learner.model.state_dict()
        assert {name for name in after if name not in before} == {"projection.weight", "log_scale"}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert trainer.fit() == "done"


@pytest.mark.parametrize("loss", ["info_nce", "cosent"])
def test_an_embedding_run_can_be_planned(loss: str) -> None:
    words = [*SMALL, *SCORED, f"task.loss={loss}", "data.batch=16", "name=t"]
    few, every = (plan(runs.composed([*words, f"memory.microbatch={n}"]), Setting(NO_SPEED, 1)) for n in ("2", "null"))
    assert few.peaks["training"] < every.peaks["training"]
    assert few.parameters == every.parameters
