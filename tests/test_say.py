"""The verb `generate`: from a prompt, from a file of them, and in a conversation."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hf_models import folder
from trainkit import cli


@pytest.fixture
def say(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`say("--prompt", "a")` is what the verb writes."""
    folder("llama", place)

    def run(*words: str, fails: bool = False) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main(["generate", "hf:llama", "--tokens", "12", *words])
        said = capsys.readouterr()
        assert done.value.code == (2 if fails else 0), said.err
        return said.err if fails else said.out

    return run


def test_prompts_of_a_file_are_answered_in_order(
    say: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "prompts.txt").write_text("one\n\nand two\nthree is the longest\n")
    rows = [
        json.loads(line) for line in say("--prompts", "prompts.txt", "--temperature", "0", "--rows", "2").splitlines()
    ]
    assert [row["prompt"] for row in rows] == ["one", "and two", "three is the longest"]
    alone = [say("--prompt", row["prompt"], "--temperature", "0") for row in rows]
    assert [f"{row['prompt']}{row['text']}\n" for row in rows] == alone
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nand two\n"))
    assert [json.loads(line) for line in say("--prompts", "-", "--temperature", "0").splitlines()] == rows[:2]
    ends = rows[0]["text"][4:6]
    cut = json.loads(say("--prompts", "prompts.txt", "--temperature", "0", "--stop", ends).splitlines()[0])["text"]
    assert cut == rows[0]["text"][: rows[0]["text"].index(ends)]


def test_a_conversation_remembers(say: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    once = say("--chat", "--prompt", "Hi", "--temperature", "0")
    assert not once.startswith("Hi")
    assert once != say("--chat", "--prompt", "Hi", "--system", "Be brief.", "--temperature", "0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nHi\n"))
    both = say("--chat", "--temperature", "0")
    assert both.startswith(once)
    assert both != once + once  # the second time it has the first before it


def test_a_quantized_model_writes(say: Callable[..., str]) -> None:
    assert len(say("--prompt", "Hi", "--quantize", "int8", "--seed", "3")) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--prompts", "b"], "give one of the two"),
        (["--prompts", "nowhere"], "--prompts nowhere cannot be read"),
        (["--system", "x"], "give --chat with it"),
        (["--quantize", "int7"], "--quantize int7 is not a format"),
    ],
)
def test_mistakes(words: list[str], message: str, say: Callable[..., str]) -> None:
    assert message in say(*words, fails=True)
