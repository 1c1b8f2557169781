"""Text to token ids and back. A document's end is one id that no text encodes to.

A tokenizer can be written into a checkpoint (`save`) and read from it (`load`): one JSON document, no code.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainkit.config import Count, config, how
from trainkit.data.learned import END, LEARNED
from trainkit.data.panics import panics_are_errors
from trainkit.errors import UserError
from trainkit.strict import one_line, parse_json, refuse_large

TIKTOKEN = {"gpt2": 50257, "cl100k": 100277, "o200k": 200019}  # with their special tokens
MAX_BYTES = 96 << 20  # of a tokenizer; the largest in use have half as many
MAX_NODES = 2_250_000  # values in its JSON; they have two millions
MAX_VOCAB = 1 << 20
_TIKTOKEN_NAMES = {"gpt2": "gpt2", "cl100k": "cl100k_base", "o200k": "o200k_base"}


class Tokenizer:
    """`vocab` ids, of which `eos` ends a document. `encode` never gives `eos`: what looks like a special is text."""

    name: str
    vocab: int
    eos: int

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Ids of a text."""
        raise NotImplementedError

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that belong before and behind a text that stands alone, by the tokenizer's own word; none if it has
        none."""
        return (), ()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become the replacement character, `eos` nothing."""
        raise NotImplementedError

    def token_bytes(self) -> NDArray[np.int32]:
        """(vocab,) how many UTF-8 bytes each id stands for; 0 for `eos` and other specials."""
        raise NotImplementedError

    def save(self) -> bytes:
        """The tokenizer as JSON."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from any other."""
        return {"name": self.name, "vocab": self.vocab, "sha256": hashlib.sha256(self.save()).hexdigest()}


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and `eos`."""

    name, vocab, eos = "bytes", 257, 256

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> NDArray[np.int32]:
        return np.array([1] * 256 + [0], dtype=np.int32)

    def save(self) -> bytes:
        return json.dumps({"kind": "bytes"}).encode()


class JsonTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library; where it names no end of text, one id is added behind the others.
    `words` is what a model's folder says beside it: its `eos`, `bos`, `pad` and `unk` token, and its chat `template`."""

    def __init__(self, text: str, name: str, words: Mapping[str, str] | None = None) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            refuse_large(text, max_nodes=MAX_NODES)  # what the library makes of each takes memory
            with panics_are_errors():
                self._fast = Fast.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(one_line(f"{name} is not a tokenizer.json: {error}")) from error
        self._fast.encode_special_tokens = True
        self._fast.no_padding()
        self._fast.no_truncation()
        self.name, self.text, self.words = name, text, dict(words or {})
        ids = self._fast.get_vocab(with_added_tokens=True).values() if self._fast.get_vocab_size() <= MAX_VOCAB else ()
        size = max(ids, default=MAX_VOCAB) + 1
        if size > MAX_VOCAB:
            raise UserError(one_line(f"{name} has no ids, or some beyond {MAX_VOCAB}"))
        said = [self.words["eos"]] if "eos" in self.words else []
        named = [self._fast.token_to_id(t) for t in (*said, END, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")]
        known = [i for i in named if i is not None]
        self.eos = known[0] if known else size
        self.vocab = max(size, self.eos + 1)

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._fast.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def id_of(self, token: str) -> int | None:
        """A token's id; None where there is none."""
        found: int | None = self._fast.token_to_id(token)
        return found

    def encode_marked(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text whose special tokens are what they look like, as a chat template writes them, and the character at
        which each begins."""
        self._fast.encode_special_tokens = False
        try:
            encoded = self._fast.encode(text, add_special_tokens=False)
            return encoded.ids, [begin for begin, _ in encoded.offsets]
        finally:
            self._fast.encode_special_tokens = True

    def encode_all(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        found = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in found]

    def template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        whole = self._fast.encode("a", add_special_tokens=True)
        inside = [i for i, special in enumerate(whole.special_tokens_mask) if not special]
        return tuple(whole.ids[: inside[0]]), tuple(whole.ids[inside[-1] + 1 :])

    def decode(self, ids: Sequence[int]) -> str:
        decoded: str = self._fast.decode([i for i in ids if i != self.eos], skip_special_tokens=False)
        return decoded

    def token_bytes(self) -> NDArray[np.int32]:
        model = json.loads(self.text)  # neither large nor deep, and the library has read it: see __init__
        specials = {t["id"] for t in model.get("added_tokens", []) if t.get("special")} | {self.eos}
        byte_level = "ByteLevel" in json.dumps(model.get("decoder") or {})  # one character a byte
        sizes = np.zeros(self.vocab, dtype=np.int32)
        for token, i in self._fast.get_vocab(with_added_tokens=True).items():
            if i not in specials:
                sizes[i] = len(token) if byte_level else len(self._fast.decode([i]).encode())
        return sizes

    def save(self) -> bytes:
        saved = {"kind": "json", "name": self.name, "tokenizer": self.text}
        return json.dumps(saved | ({"words": self.words} if self.words else {})).encode()


class TiktokenTokenizer(Tokenizer):
    """One of OpenAI's byte-pair encodings, by the `tiktoken` library."""

    def __init__(self, name: str, encoding: Any) -> None:
        self.name, self._encoding = name, encoding
        self.eos, self.vocab = encoding.eot_token, encoding.n_vocab
        self.ranks: dict[bytes, int] = encoding._mergeable_ranks
        self.specials: dict[str, int] = encoding._special_tokens
        self.pattern: str = encoding._pat_str

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.array(self._encoding.encode_ordinary(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode([i for i in ids if i < self.eos])
        return text

    def token_bytes(self) -> NDArray[np.int32]:
        sizes = np.zeros(self.vocab, dtype=np.int32)
        for token, i in self.ranks.items():
            sizes[i] = len(token)
        return sizes

    def save(self) -> bytes:
        ranks = sorted(self.ranks.items(), key=lambda pair: pair[1])
        lines = [base64.b64encode(token).decode() for token, _ in ranks]
        saved = {
            "kind": "tiktoken",
            "name": self.name,
            "pattern": self.pattern,
            "ranks": " ".join(lines),
            "ids": [rank for _, rank in ranks] if any(r != i for i, (_, r) in enumerate(ranks)) else None,
            "special": self.specials,
        }
        return json.dumps(saved).encode()


def load(saved: bytes) -> Tokenizer:
    """The tokenizer that `save` wrote.

    Raises:
        UserError: it is none.
    """
    try:
        value = parse_json(saved, max_bytes=MAX_BYTES, max_nodes=MAX_NODES)
        kind = value["kind"]
        match kind:
            case "bytes":
                return BytesTokenizer()
            case "json":
                words = value.get("words", {})
                texts = [value["tokenizer"], value["name"], *words, *words.values()]
                if all(isinstance(text, str) for text in texts):
                    return JsonTokenizer(value["tokenizer"], value["name"], words)
            case "tiktoken":
                return _tiktoken(value)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(one_line(f"not a saved tokenizer: {error}")) from error
    raise UserError(one_line(f"not a saved tokenizer: kind {kind!r}"))


def _tiktoken(value: dict[str, Any]) -> TiktokenTokenizer:
    """What `TiktokenTokenizer.save` wrote. The library takes ids on trust, and panics where two tokens have one.

    Raises:
        KeyError, ValueError, TypeError: it is something else.
    """
    from tiktoken import Encoding

    name, ranks, special = value["name"], value["ranks"], value["special"]
    if not all(isinstance(text, str) for text in (name, ranks, value["pattern"])) or not isinstance(special, dict):
        raise ValueError("a field has another type than it should")
    if ranks.count(" ") >= MAX_VOCAB:
        raise ValueError(f"it has more than {MAX_VOCAB} tokens")
    tokens = [base64.b64decode(token, validate=True) for token in ranks.split(" ")]
    ids = value["ids"] if value["ids"] is not None else range(len(tokens))
    ranked = dict(zip(tokens, ids, strict=True))
    every = [*ids, *special.values()]
    if not all(type(i) is int and 0 <= i < MAX_VOCAB for i in every):
        raise ValueError(f"an id is none below {MAX_VOCAB}")
    if len(ranked) < len(tokens) or len(set(every)) < len(every):
        raise ValueError("a token or an id stands twice")
    with panics_are_errors():
        encoding = Encoding(name, pat_str=value["pattern"], mergeable_ranks=ranked, special_tokens=special)
    return TiktokenTokenizer(name, encoding)


@config
class TokenizerConfig:
    """Which tokenizer reads a text: `bytes`; `bpe`, trained on the text to `vocab` ids; `wordpiece`, likewise, of
    lower-case words (it reads, and cannot write: spaces and capitals are lost); `file`, a tokenizer.json at `path`; `hf`,
    that of a model's folder, with its chat template; or `gpt2`, `cl100k` and `o200k`, which tiktoken fetches once
    (TIKTOKEN_CACHE_DIR)."""

    kind: Literal["bytes", "bpe", "wordpiece", "file", "hf", "gpt2", "cl100k", "o200k"] = "bytes"
    vocab: Count = 4096
    path: str | None = how(None)

    def __post_init__(self) -> None:
        if self.kind in ("file", "hf") and self.path is None:
            where = "a tokenizer.json" if self.kind == "file" else "a model's folder"
            raise ValueError(f"data.tokenizer.path is missing: a tokenizer of kind {self.kind} is read from {where}")
        if self.kind in LEARNED and self.vocab < 257:
            raise ValueError(f"data.tokenizer.vocab={self.vocab} cannot hold the 256 bytes and the end of text")

    def size(self) -> int:
        """How many ids it has, without reading any text."""
        if self.kind in LEARNED:
            return self.vocab
        return TIKTOKEN[self.kind] if self.kind in TIKTOKEN else self._ready().vocab

    def key(self) -> str:
        """What tells its ids from any other's, wherever a file of it lies."""
        return f"{self.kind} {self._ready().identity['sha256']}" if self.kind in ("file", "hf") else str(self)

    def build(self, texts: Callable[[], Iterable[str]]) -> Tokenizer:
        """The tokenizer; `texts` are what a bpe or a wordpiece learns from."""
        return self._learned(texts()) if self.kind in LEARNED else self._ready()

    def _learned(self, texts: Iterable[str]) -> Tokenizer:
        return JsonTokenizer(LEARNED[self.kind](self.vocab, texts), self.kind)

    def _ready(self) -> Tokenizer:
        if self.kind == "bytes":
            return BytesTokenizer()
        if self.kind in ("file", "hf"):
            from trainkit.data.pretrained import tokenizer_at

            assert self.path is not None
            return tokenizer_at(Path(self.path))
        import tiktoken

        try:
            return TiktokenTokenizer(self.kind, tiktoken.get_encoding(_TIKTOKEN_NAMES[self.kind]))
        except Exception as error:  # whatever its download raises
            raise UserError(
                f"the tokenizer {self.kind} could not be fetched ({type(error).__name__}): put its file into the folder "
                f"that TIKTOKEN_CACHE_DIR names, or use data.tokenizer.kind=bpe"
            ) from error
