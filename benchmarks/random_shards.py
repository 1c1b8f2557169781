"""Token shards of random ids, for benchmarks that need no text."""

import json
from pathlib import Path

import numpy as np

from trainkit.data.shards import hash_file
from trainkit.data.tokenizers import JsonTokenizer


def write(folder: Path, vocab: int, tokens: int) -> Path:
    """`folder` as `trainkit prepare` would have left it, with three quarters of the ids to train on."""
    vocabulary = {f"<{i}>": i for i in range(vocab - 1)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<0>"}
    tokenizer = JsonTokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": model}), "random")
    ids = np.random.default_rng(0).integers(0, vocab - 1, tokens).astype("<u2")
    files = {}
    for split, part in (("train", ids[: tokens * 3 // 4]), ("validation", ids[tokens * 3 // 4 :])):
        part.tofile(folder / f"{split}.bin")
        files[f"{split}.bin"] = {"split": split, "tokens": len(part), "xxh3_128": hash_file(folder / f"{split}.bin")}
    (folder / "tokenizer.json").write_bytes(tokenizer.save())
    splits = {f["split"]: [[name, 0, f["tokens"]]] for name, f in files.items()}
    index = {
        "format": 1,
        "dtype": "<u2",
        "tokenizer": tokenizer.identity,
        "eos": tokenizer.eos,
        "fingerprint": "random",
    }
    index |= {"documents": 1, "text_bytes": 0, "splits": splits, "files": files}
    (folder / "index.json").write_text(json.dumps(index))
    return folder
