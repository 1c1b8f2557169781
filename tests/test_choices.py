"""What conf/ holds composes: every choice, and choices of a person's own."""

from pathlib import Path

import pytest

from trainkit import run as runs
from trainkit.choices import ANY_OF_SEVERAL, CONF, choices
from trainkit.errors import UserError


def every_choice() -> list[str]:
    return [f"{group}={c}" for group, found in choices().items() for c in found]


ON_PAIRS = ["data.path=pairs.jsonl", "data.length=256", "model.adapter=lora", "start_from=base"]
NEEDS = {
    "data=text": ["data.path=README.md"],
    "data=shards": ["data.path=anywhere"],
    "task=dpo": [
        "task=dpo",
        "data=preferences",
        "data.path=pairs.jsonl",
        "data.length=256",
        "model.adapter=lora",
        "start_from=base",
    ],
    "data=preferences": [
        "task=dpo",
        "data=preferences",
        "data.path=pairs.jsonl",
        "data.length=256",
        "model.adapter=lora",
        "start_from=base",
    ],
    "task=sft": ["data=chat", "data.path=chats.jsonl", "data.length=256"],
    "data=chat": ["task=sft", "data.path=chats.jsonl", "data.length=256"],
    "model=hf": [f"model.name={Path(__file__).parent / 'llama'}"],
    **{f"model.adapter={kind}": ["start_from=base"] for kind in ("lora", "dora", "qlora")},
    "data=mixture": ["data.sources.a.path=a", "data.sources.b.path=b"],
    "memory=step_in_backward": ["clip=0"],
    "task=embedding": ["data=wordnet"],
    "task=mlm": ["model.attention.causal=false"],
    "model=static": ["task=embedding", "data=wordnet"],
    "data=pairs": ["task=embedding", "data.path=pairs.tsv"],
    "data=stsb": ["task=embedding", "task.loss=cosent"],
    "data=wordnet": ["task=embedding"],
}
ALONE = {"4bit", "fp8", "step_in_backward", "stream"}  # what cannot be joined with others of its group


@pytest.mark.parametrize("choice", every_choice())
def test_every_choice_composes(choice: str) -> None:
    run = runs.composed([choice, *NEEDS.get(choice, [])])
    again = runs.saved(run.yaml())
    assert again == run
    assert not again.differs(run)


def test_a_group_of_several_takes_any_of_them_joined() -> None:
    for group in ANY_OF_SEVERAL:
        every = [choice for choice in choices()[group] if choice not in ALONE]
        joined = runs.composed([f"{group}={'+'.join(every)}"])
        assert runs.composed([f"{group}=[{','.join(reversed(every))}]"]) == joined


def test_a_person_brings_choices_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text((CONF / "model" / "tiny.yaml").read_text())
    assert runs.composed(["model=mine"], tmp_path).model == runs.composed(["model=tiny"]).model
    with pytest.raises(UserError, match="model has no choice 'mine'"):
        runs.composed(["model=mine"])


def test_a_task_names_the_data_that_it_takes() -> None:
    for task in choices()["task"]:
        with pytest.raises(UserError, match="learns from") as refused:
            runs.composed([f"task={task}", "data=chat" if task != "sft" else "data=moby-dick"])
        named = str(refused.value).split("use data=")[1].replace(" or ", ", ").split(", ")
        kinds = {runs.composed([f"data={n}", *NEEDS.get(f"data={n}", [])]).data.gives for n in named}
        assert len(kinds) == 1
        assert f"learns from {kinds.pop()}" in str(refused.value)
