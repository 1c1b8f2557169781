"""Text to ids and back, and tokenizers that survive being carried in a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.tokenizers import BytesTokenizer, TiktokenTokenizer, Tokenizer, TokenizerConfig, load
from trainkit.errors import UserError

TEXT = "Call me Ishmael — naïve café, 1851. <|endoftext|> \n\n  the end… 鯨"


def bpe() -> Tokenizer:
    return TokenizerConfig(kind="bpe", vocab=320).build(lambda: [TEXT * 9])


def tik() -> Tokenizer:
    ranks = {bytes([i]): i for i in range(256)} | {b"he": 256, b"th": 257, b"the": 258}
    encoding = tiktoken.Encoding(
        "toy", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 259}
    )
    return TiktokenTokenizer("toy", encoding)


@pytest.mark.parametrize("make", [BytesTokenizer, bpe, tik])
def test_there_and_back(make: type[Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.eos not in ids  # what looks like a special is text
    assert int(ids.max()) < tokenizer.vocab
    assert tokenizer.decode([*ids.tolist(), tokenizer.eos]) == TEXT
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab,)
    assert int(sizes[ids].sum()) == len(TEXT.encode())
    assert sizes[tokenizer.eos] == 0
    again = load(tokenizer.save())
    assert np.array_equal(again.encode(TEXT), ids)
    assert again.identity == tokenizer.identity
    assert (again.vocab, again.eos) == (tokenizer.vocab, tokenizer.eos)


@given(st.text())
@settings(deadline=None)
def test_bytes_are_utf8(text: str) -> None:
    tokenizer = BytesTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_bytes_that_are_no_text_become_the_replacement_character() -> None:
    assert BytesTokenizer().decode([0x61, 0xC3, 256]) == "a\ufffd"


def test_a_bpe_learns_merges_and_is_found_again() -> None:
    tokenizer = bpe()
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode())
    Path("tokenizer.json").write_text(json.loads(tokenizer.save())["tokenizer"])
    cfg = TokenizerConfig(kind="file", path="tokenizer.json")
    assert cfg.size() == tokenizer.vocab
    assert np.array_equal(cfg.build(list).encode(TEXT), tokenizer.encode(TEXT))


def test_wrong_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer.path is missing"):
        TokenizerConfig(kind="file")
    with pytest.raises(ValueError, match="cannot hold the 256 bytes"):
        TokenizerConfig(kind="bpe", vocab=100)
    with pytest.raises(UserError, match="cannot be read"):
        TokenizerConfig(kind="file", path="nowhere.json").size()
    Path("no.json").write_text("{}")
    with pytest.raises(UserError, match="no.json is not a tokenizer.json"):
        TokenizerConfig(kind="file", path="no.json").size()
    for saved in (b"{}", b"nothing", b'{"kind": "other"}', b'{"kind": "json"}'):
        with pytest.raises(UserError, match="not a saved tokenizer"):
            load(saved)


def test_a_tokenizer_that_cannot_be_fetched_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    assert TokenizerConfig(kind="gpt2").size() == 50257
    with pytest.raises(
        UserError, match="the tokenizer gpt2 could not be fetched .ConnectionError.: .*TIKTOKEN_CACHE_DIR"
    ):
        TokenizerConfig(kind="gpt2").build(list)
