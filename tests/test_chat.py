"""Conversations: what is rendered, what is learned of it, and how rows are filled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SMALL
from tests.hf_models import TEMPLATE, folder, text_tokenizer
from trainkit import build
from trainkit import run as runs
from trainkit.data import templates
from trainkit.data.chat import Chat, conversations, prompt
from trainkit.data.packing import PackedRows, Sequences, packed
from trainkit.data.tokenizers import JsonTokenizer, TokenizerConfig
from trainkit.errors import UserError

WORDS = {"eos": "<|im_end|>", "bos": "<|im_start|>", "template": TEMPLATE}
MARKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}!{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "naïve 🙂?"},
    {"role": "assistant", "content": "Yes — été."},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": "No."},
]


def chats(place: Path, count: int = 12) -> Path:
    """Conversations of different lengths as JSON lines."""
    lines = []
    for i in range(count):
        turns = [
            {"role": ("user", "assistant")[k % 2], "content": f"word {i} " * (1 + (i * k) % 3)}
            for k in range(2 + i % 3)
        ]
        lines.append(json.dumps({"messages": turns}))
    (place / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return place / "chats.jsonl"


@pytest.mark.parametrize(
    ("template", "said"),
    [(TEMPLATE, ["Yes — été.<|im_end|>\n", "No.<|im_end|>\n"]), (MARKING, ["Yes — été.!", "No.!"])],
)
def test_only_what_the_assistant_wrote_is_learned(template: str, said: list[str]) -> None:
    text, spans = templates.with_spans(template, WORDS, CHAT)
    assert [text[a:b] for a, b in spans] == said
    assert text == templates.rendered(template, WORDS, CHAT)
    assert "\ufdd0" not in text
    assert text.startswith("<|im_start|>")


def test_it_is_rendered_as_transformers_does() -> None:
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=JsonTokenizer(text_tokenizer(), "t")._fast)
    theirs.bos_token = "<|im_start|>"
    for template in (TEMPLATE, MARKING):
        for reply in (False, True):
            theirs.chat_template = template
            expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=reply)
            assert templates.rendered(template, WORDS, CHAT, reply=reply) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system') }}", "the chat template cannot be used: no system"),
        ("{% for", "cannot be used"),
        ("{{ messages[0].nothing.at_all }}", "cannot be used"),
        ("{{ messages.append(1) }}", "cannot be used"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used"),
        (
            "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "in another way when more follows",
        ),
    ],
)
def test_a_template_that_cannot_be_used(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        templates.with_spans(template, WORDS, CHAT)


def test_the_mask_falls_on_the_assistants_tokens(place: Path) -> None:
    where = folder("llama", place)
    cfg = Chat(path=str(chats(place)), length=64, batch=2, tokenizer=TokenizerConfig(kind="hf", path=str(where)))
    corpus = cfg.open()
    tokenizer, part = corpus.tokenizer, corpus.train
    for i in range(len(part.begins) - 1):
        ids = part.ids[part.begins[i] : part.begins[i + 1]]
        learned = part.learned[part.begins[i] : part.begins[i + 1]]
        assert ids[0] == 256
        assert not learned[0]
        text = tokenizer.decode([*ids[learned].tolist(), 65])[:-1]
        whole = tokenizer.decode([*ids.tolist(), 65])[:-1]
        answers = [
            turn.removeprefix("assistant\n") for turn in whole.split("<|im_start|>") if turn.startswith("assistant")
        ]
        assert text == "".join(answers).replace("<|im_end|>", "")
        assert (ids[learned] == 257).sum() == len(answers)  # where to stop is learned
    assert cfg.open() is corpus
    every = Chat(path=cfg.path, length=64, batch=2, tokenizer=cfg.tokenizer, learn="all").open()
    assert every.train.learned.all()
    assert np.array_equal(every.train.ids, part.ids)
    assert every.fingerprint != corpus.fingerprint


def test_a_prompt_ends_where_the_answer_begins() -> None:
    tokenizer = JsonTokenizer(text_tokenizer(), "t", WORDS)
    ids = prompt(tokenizer, CHAT[:1])
    assert tokenizer.decode([i for i in ids if i < 256]) == "user\nnaïve 🙂?\nassistant\n"
    assert [i for i in ids if i >= 256] == [256, 257, 256]


@pytest.mark.parametrize("room", [7, 16, 30])
def test_rows_are_full_and_everything_is_in_one(room: int) -> None:
    lengths = np.random.default_rng(0).integers(1, room + 1, 200)
    rows = packed(lengths, room)
    assert sorted(i for row in rows for i in row) == list(range(200))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled) <= room
    assert len(rows) <= 1.22 * lengths.sum() / room + 1  # best fit decreasing is never worse than 11/9 of the best


def sequences(*texts: str) -> Sequences:
    """Sequences of letters; a capital one is learned."""
    ids = np.array([ord(c) for text in texts for c in text], dtype=np.uint32)
    learned = np.array([c.isupper() for text in texts for c in text])
    return Sequences(ids, learned, np.cumsum([0, *map(len, texts)]))


def test_a_row_says_what_follows_what() -> None:
    rows = PackedRows(sequences("abCD", "xYz", "LONGERthan"), np.ones(257, np.int32), 256, 8, seed=0)
    batch = rows.batch(np.array([*range(len(rows.rows)), -1]))
    shown = ["".join("." if t == 256 else chr(t) for t in row) for row in batch["tokens"].tolist()]
    assert shown == ["LONGERth", "abCDxYz.", "........"]
    labels = ["".join("." if t == -100 else chr(t) for t in row) for row in batch["labels"].tolist()]
    assert labels == ["ONGER...", ".CD.Y...", "........"]
    assert batch["documents"].tolist() == [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 2], [0] * 8]
    assert batch["bytes"].tolist() == [5, 3, 0]
    alone = PackedRows(rows.sequences, rows.token_bytes, 256, 8, seed=0, pack=False)
    assert len(alone.rows) == 3
    assert "documents" not in alone.batch(np.array([0]))


def test_every_epoch_has_every_row_once() -> None:
    rows = PackedRows(sequences(*["ab"] * 9), np.ones(257, np.int32), 256, 4, seed=3)
    ids = rows.shuffled(np.arange(10))
    assert len(rows.rows) == 5
    assert sorted(ids[:5]) == sorted(ids[5:]) == list(range(5))


def tuned(place: Path, *overrides: str) -> Any:
    small = [word for word in SMALL if not word.startswith(("model.", "data"))]
    words = ["model=hf", f"model.name={place / 'llama'}", "task=sft", "data=chat", f"data.path={place / 'chats.jsonl'}"]
    run = runs.composed([*small, *words, "data.length=64", "data.batch=4", "data.validation=0.2", *overrides, "name=t"])
    with build.trainer(run, Path("runs/t")) as trainer:
        return trainer


def test_packing_changes_no_gradient(place: Path) -> None:
    """Packed or a conversation a row, of one batch that holds them all."""
    folder("llama", place)
    chats(place, 10)
    found = []
    for pack in ("true", "false"):
        learner = tuned(place, f"data.pack={pack}", "optimizer=sgd").learner
        rows = learner.loader._train
        batch = rows.batch(np.arange(rows.sizes[0]))
        loss = learner.task.backward(learner.model, batch, microbatch=100, ranks=learner.ranks)["loss"]
        found.append((float(loss), torch.cat([p.grad.flatten() for p in learner.model.parameters()])))
        Path("runs/t/run.yaml").unlink()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_it_learns_to_answer_and_goes_on(place: Path) -> None:
    folder("llama", place)
    chats(place)
    trainer = tuned(place, "steps=8", "optimizer.lr=0.01")
    run = runs.read(Path("runs/t"))
    assert run is not None
    with build.trainer(run, Path("runs/t")) as whole:
        whole.fit()
    before = trainer.learner.evaluate(trainer.learner.loader.validation(), lambda: False)
    after = whole.learner.evaluate(whole.learner.loader.validation(), lambda: False)
    assert after is not None
    assert before is not None
    assert after["val_loss"] < before["val_loss"] - 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": "no"}', "at byte 0: 'messages' is no list of messages with a role and a content"),
        ('{"messages": []}', "is no list of messages"),
        ('{"talk": []}', r"has no field 'messages' \(it has talk\)"),
        ("[1]", "the line is no object"),
        ("{", "not JSON"),
        ('{"messages": [{"role": "user", "content": "only asked"}]}\n' * 3, "holds no two conversations in which"),
    ],
)
def test_what_is_no_conversation(text: str, message: str, place: Path) -> None:
    (place / "bad.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        Chat(path=str(place / "bad.jsonl"), length=8, batch=1).open()


def test_sharegpt_is_read_too(place: Path) -> None:
    (place / "s.jsonl").write_text('{"c": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}')
    assert [m for _, m in conversations("s.jsonl", "c")] == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ]


def test_what_does_not_go_together() -> None:
    with pytest.raises(UserError, match="task=sft learns from conversations, and data=text has text"):
        runs.composed(["task=sft"])
    with pytest.raises(UserError, match="data.path is missing: give a file of conversations"):
        Chat(length=8, batch=1).check()
    with pytest.raises(UserError, match="trains no tokenizer"):
        Chat(path="x", length=8, batch=1, tokenizer=TokenizerConfig(kind="bpe")).check()


def test_a_template_of_ones_own(place: Path, trained: Callable[..., Any]) -> None:
    chats(place)
    (place / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}~{% endfor %}")
    corpus = Chat(path="chats.jsonl", length=64, batch=2, template="mine.jinja").open()
    assert corpus.tokenizer.decode(corpus.train.ids[: corpus.train.begins[1]].tolist()).count("~") == 2
    with pytest.raises(UserError, match="data.template=nowhere.jinja cannot be read"):
        Chat(path="chats.jsonl", length=64, batch=2, template="nowhere.jinja").open()
