"""Ours as others' models: what is exported opens in transformers, gives the same logits and reads the same ids."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import TEXT
from tests.hf_models import KINDS, folder, ids
from tests.test_models import KINDS as DECODERS
from tests.test_models import decoder
from trainkit import build, cli, imports
from trainkit import run as runs
from trainkit.data import exported, tokenizers
from trainkit.data.learned import LEARNED
from trainkit.data.tokenizers import BytesTokenizer, JsonTokenizer, Tokenizer
from trainkit.errors import UserError
from trainkit.export import export
from trainkit.hf import families, names, weights
from trainkit.hf.folder import made, write_tensors
from trainkit.models.positions import RopeScaling
from trainkit.opened import opened, tokenizer_of

RUNS = Path("runs")


def theirs(where: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", [*KINDS, "llama-bias"])
def test_what_comes_in_goes_out_the_same(kind: str, place: Path) -> None:
    where = folder(kind, place)
    export(f"hf:{where}", place / "out", RUNS, dtype="fp32")
    one, other = theirs(where), theirs(place / "out")
    assert type(one) is type(other) or kind == "mistral-full"  # which is LLaMA's
    assert torch.equal(one(ids()).logits, other(ids()).logits)
    state = one.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    read = transformers.AutoTokenizer.from_pretrained(place / "out")
    assert (
        read("Hi <|im_end|>")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(where)("Hi <|im_end|>")["input_ids"]
    )
    chat = [{"role": "user", "content": "Hi"}]
    assert read.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert read.eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.norm=layernorm", "model.position=learned", "model.bias=true", "model.mlp.activation=gelu_tanh"]],
)
def test_a_run_goes_out_with_its_tokenizer_and_its_story(
    overrides: list[str], trained: Callable[..., build.Trainer], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(*overrides, name="mine").learner.model.eval()
    export("mine", place / "out", RUNS, dtype="fp32")
    assert "out holds mine as" in capsys.readouterr().out
    torch.testing.assert_close(theirs(place / "out")(ids()).logits, model(ids()), rtol=1e-5, atol=1e-5)
    read = transformers.AutoTokenizer.from_pretrained(place / "out")
    assert read("naïve")["input_ids"] == list("naïve".encode())
    assert read.eos_token_id == 256
    assert read.decode(list("naïve".encode())) == "naïve"
    card = (place / "out/README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows[0] == "| step | loss | val_loss | val_bits_per_byte | val_perplexity |"
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| 1", "| 2", "| 3", "| 4", "| 5", "| 6"]
    assert "corpus (fingerprint" in card
    assert "steps: 6" in card
    assert runs.saved((place / "out/run.yaml").read_text()).name == "mine"
    assert not [p for p in place.iterdir() if p.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_is_what_its_config_says_or_is_refused(kind: str) -> None:
    cfg = decoder(**DECODERS[kind])
    if kind == "learned":
        with pytest.raises(families.Unlike, match="model.position=learned"):
            families.config(cfg)
        return
    said = families.fields(families.config(cfg))
    there = {**said, "attention": {k: v for k, v in said["attention"].items() if v}}
    for key, value in there.items():
        own = getattr(cfg, key)
        if key == "attention":
            assert (value["heads"], value.get("window")) == (own.heads, own.window)
            assert value.get("head_width", 4 if cfg.width == 16 else None) == own.shape(cfg.width)[2]
            assert value.get("qk_norm", False) == own.qk_norm
        elif key == "mlp":
            assert (value["activation"], value["hidden"]) == (own.activation, own.width(cfg.width))
        else:
            assert value == own, key


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=2.0),
        RopeScaling(kind="llama3", factor=8.0, original=16, low=1.0, high=3.0),
        RopeScaling(kind="yarn", factor=4.0, original=16, high=32.0, attention=1.25),
    ],
)
def test_a_scaling_survives(scaling: RopeScaling) -> None:
    said = families.fields(families.config(decoder(rope_scaling=scaling)))["rope_scaling"]
    known = RopeScaling(**said)
    assert (known.kind, known.factor, known.magnitude) == (scaling.kind, scaling.factor, scaling.magnitude)
    frequencies = torch.logspace(0, -4, 8, dtype=torch.float64)
    assert torch.equal(known.apply(frequencies, 1e4), scaling.apply(frequencies, 1e4))


def test_no_architecture_has_it(trained: Callable[..., build.Trainer], place: Path) -> None:
    trained("model.mlp.activation=geglu", name="odd")
    with pytest.raises(UserError, match="odd cannot be exported: no architecture of transformers is it; .*geglu"):
        export("odd", place / "out", RUNS, dtype="fp32")
    assert not (place / "out").exists()


def test_nothing_is_written_over_and_nothing_left_half(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder("llama", place)
    for there in (where, where / "config.json"):
        with pytest.raises(UserError, match="is there already"):
            export(f"hf:{where}", there, RUNS, dtype="fp32")

    def stopped() -> None:
        with made(place / "new") as partial:
            (partial / "some").write_text("half")
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        stopped()
    assert {p.name for p in place.iterdir()} == {"corpus", "llama"}
    (place / "empty").mkdir()
    with made(place / "empty") as partial:
        (partial / "some").write_text("whole")
        assert not list((place / "empty").iterdir())
    assert (place / "empty/some").read_text() == "whole"
    with pytest.raises(UserError, match="--dtype fp31 is none"):
        export(f"hf:{where}", place / "out", RUNS, dtype="fp31")


def test_large_models_go_into_several_files(place: Path) -> None:
    state = {f"t{i}": torch.full((4, 4), float(i)) for i in range(5)}
    write_tensors(place, state, max_bytes=130)
    assert len(weights.files(place)) == 3
    index = json.loads((place / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    with weights.opened(place) as given:
        assert {name: float(given.get(name)[0, 0]) for name in given} == {f"t{i}": float(i) for i in range(5)}


def test_a_narrow_export_is_half_as_large(place: Path) -> None:
    where = folder("llama", place)
    export(f"hf:{where}", place / "out", RUNS, dtype="bf16")
    with weights.opened(place / "out") as given:
        assert {given.get(name).dtype for name in given} == {torch.bfloat16}
    config = json.loads((place / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"


def tiktoken_like() -> Tokenizer:
    """A byte-pair encoding as tiktoken has it, trained here."""
    learner = JsonTokenizer(LEARNED["bpe"](300, [TEXT * 3]), "bpe")
    assert isinstance(learner, JsonTokenizer)
    letters = {c: b for b, c in enumerate(exported._letters())}
    vocab = json.loads(learner.text)["model"]["vocab"]
    tokens = [bytes(letters[c] for c in t) for t, i in sorted(vocab.items(), key=lambda x: x[1]) if t != tokenizers.END]
    tokens = [bytes([b]) for b in range(256)] + [t for t in tokens if len(t) > 1]
    saved = {
        "kind": "tiktoken",
        "name": "mine",
        "pattern": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        "ranks": " ".join(base64.b64encode(t).decode() for t in tokens),
        "ids": None,
        "special": {tokenizers.END: len(tokens)},
    }
    return tokenizers.load(json.dumps(saved).encode())


@pytest.mark.parametrize(
    "make", [BytesTokenizer, tiktoken_like, lambda: JsonTokenizer(LEARNED["bpe"](300, [TEXT]), "bpe")]
)
def test_tokenizers_give_the_same_ids(make: Callable[[], Tokenizer], place: Path) -> None:
    ours = make()
    for name, content in exported.files(ours, 64).items():
        (place / name).write_bytes(content)
    (place / "config.json").write_text('{"model_type": "llama"}')
    read = transformers.AutoTokenizer.from_pretrained(place)
    assert read.eos_token_id == ours.eos
    assert read.model_max_length == 64
    for text in (TEXT, imports.PROBE, "  they'll  \n\n and\t42 ÿ 漢字 🙂 "):
        assert read(text, add_special_tokens=False)["input_ids"] == ours.encode(text).tolist()
        assert read.decode(ours.encode(text).tolist()) == text


def test_the_verb(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder("qwen3", place)
    with pytest.raises(SystemExit) as done:
        cli.main(["export", f"hf:{where}", "out", "--dtype", "bf16"])
    assert done.value.code == 0
    assert "out holds qwen3" in capsys.readouterr().out
    loaded, run = opened("hf:out", RUNS)
    assert run.model == opened(f"hf:{where}", RUNS)[1].model
    assert tokenizer_of(loaded).eos == 257


def test_names_go_both_ways() -> None:
    for kind, family in (("qk_norm", "qwen3"), ("gpt2", "gpt2"), ("grouped", "llama")):
        cfg = decoder(tied=family == "gpt2", **DECODERS[kind])
        state = cfg.build().state_dict()
        for tensor in state.values():
            torch.nn.init.normal_(tensor)
        there = names.theirs(state, cfg, family)
        back = names.ours(there, list(state), family)
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
