"""A tokenizer as the files that transformers opens: tokenizer.json, tokenizer_config.json and a chat template."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from trainkit.data.pretrained import CONFIG, FILE, KINDS, TEMPLATE
from trainkit.data.tokenizers import END, BytesTokenizer, JsonTokenizer, TiktokenTokenizer, Tokenizer


def files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """The files by name; the ids are the same. `context` is the longest text of the model, in tokens."""
    words: Mapping[str, str] = getattr(tokenizer, "words", {})
    text = tokenizer_json(tokenizer)
    from tokenizers import Tokenizer as Fast

    eos = str(Fast.from_str(text).id_to_token(tokenizer.eos))
    said: dict[str, Any] = {f"{kind}_token": words[kind] for kind in KINDS if kind in words}
    said |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "pad_token": words.get("pad", eos),
    }
    made = {FILE: text.encode(), CONFIG: json.dumps(said, indent=2, ensure_ascii=False).encode()}
    return made | ({TEMPLATE: words["template"].encode()} if "template" in words else {})


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """A tokenizer.json of the `tokenizers` library with the same ids, `eos` among them.

    Raises:
        TypeError: a kind that is none of ours.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    if isinstance(tokenizer, JsonTokenizer):
        fast = Fast.from_str(tokenizer.text)
        if fast.id_to_token(tokenizer.eos) is not None:
            return tokenizer.text
        fast.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        return str(fast.to_str())
    letters = _letters()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if isinstance(tokenizer, BytesTokenizer):
        vocab, specials = {letters[b]: b for b in range(256)}, {END: tokenizer.eos}
        fast = Fast(models.BPE(vocab, []))
        fast.pre_tokenizer = level
    elif isinstance(tokenizer, TiktokenTokenizer):
        ranks, specials = tokenizer.ranks, tokenizer.specials
        vocab = {_spelled(token, letters): rank for token, rank in ranks.items()}
        merges = [(_spelled(one, letters), _spelled(other, letters)) for one, other in _merges(ranks)]
        from tokenizers import Regex

        fast = Fast(models.BPE(vocab, merges))
        split = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    else:
        raise TypeError(f"{type(tokenizer).__name__} has no tokenizer.json")
    fast.decoder = decoders.ByteLevel()
    text = json.loads(fast.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    text["added_tokens"] = [{"id": i, "content": t, "special": True, **flags} for t, i in specials.items()]
    text["model"]["vocab"] |= specials  # so that an added token has the id that it had
    return json.dumps(text, ensure_ascii=False)


def _letters() -> list[str]:
    """The character that stands for each byte in GPT-2's files (Radford et al. 2019): itself where it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in seen else chr(next(hidden)) for b in range(256)]


def _spelled(token: bytes, letters: list[str]) -> str:
    return "".join(letters[b] for b in token)


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte was made of, by rank: what its bytes come to where it may not be."""
    return [_parts(token, ranks, rank) for token, rank in sorted(ranks.items(), key=lambda x: x[1]) if len(token) > 1]


def _parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs: list[Any] = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
