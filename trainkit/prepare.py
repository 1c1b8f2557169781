"""Text to token shards: the verb `prepare`."""

from pathlib import Path

from rich.console import Console

from trainkit.data.prepare import plan
from trainkit.data.prepare import prepare as write_shards
from trainkit.data.tokenizers import TIKTOKEN, TokenizerConfig
from trainkit.errors import UserError, nearest
from trainkit.progress import bytes_bar
from trainkit.units import human_bytes, human_count

TRAINED = ("bytes", "bpe")


def prepare(
    sources: list[str], out: Path, tokenizer: str, vocab: int, validation: float, field: str, workers: int | None
) -> None:
    """Write `out` and say what is in it.

    Raises:
        UserError: a source, the tokenizer or the folder is wrong.
    """
    if not 0 <= validation <= 0.5:
        raise UserError(f"--validation {validation} is no fraction from 0 to 0.5")
    chosen = _tokenizer(tokenizer, vocab)
    work = plan(sources, chosen, field=field, validation=validation)
    with bytes_bar() as report:
        index = write_shards(work, chosen, out, workers=workers, report=report)
    tokens = index["tokens"]
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{out}: {human_count(tokens['train'])} tokens to learn from and {human_count(tokens['validation'])} held out, "
        f"of {human_count(index['documents'])} documents and {human_bytes(index['text_bytes'])} of text, "
        f"tokenizer {index['tokenizer']['name']} with {index['tokenizer']['vocab']} ids"
    )
    if work.skipped:
        console.print(f"{work.skipped} files that are no text were left out")
    room = -(-index["tokenizer"]["vocab"] // 64) * 64
    console.print(f"  trainkit train data=shards data.path={out} model.vocab={room}", markup=False)


def _tokenizer(name: str, vocab: int) -> TokenizerConfig:
    if name in (*TRAINED, *TIKTOKEN):
        return TokenizerConfig(kind=name, vocab=vocab)  # type: ignore[arg-type]  # one of the literals
    if not name.endswith(".json"):
        raise UserError(
            f"--tokenizer {name} is none{nearest(name, [*TRAINED, *TIKTOKEN, 'a path to a tokenizer.json'])}"
        )
    return TokenizerConfig(kind="file", path=name)
