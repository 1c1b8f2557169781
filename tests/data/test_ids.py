"""Token shards that hold ids which their tokenizer has not."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL
from tests.hostile_data import data_folder, index, train
from tests.test_hostile import said
from trainkit.data import loader, shards
from trainkit.errors import UserError


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("file", "number"), [("a.bin", 416), ("b.bin", 96)])
def test_an_id_that_the_tokenizer_has_not_is_named(
    file: str, number: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data_folder(Path("data"))
    Path("data/index.json").write_bytes(index())
    ids = np.fromfile(f"data/{file}", dtype="<u2")
    ids[number] = 257  # its own are 0 to 256
    ids.tofile(f"data/{file}")
    small = [word for word in SMALL if not word.startswith(("data=", "data.path", "data.validation", "steps"))]
    words = ["train", *small, "data=shards", "data.path=data", "steps=8", f"data.workers={workers}"]
    code, err = said(capsys, *words)
    assert code == 2
    assert err == (
        f"trainkit: data/{file} holds the id 257 at position {number}, and its tokenizer has 257 ids: it is damaged, or "
        f"another tokenizer's; prepare it again\n"
    )


def test_every_place_of_a_row_is_looked_at() -> None:
    data_folder(Path("data"))
    Path("data/index.json").write_bytes(train(["b.bin", 10, 20], ["a.bin", 100, 190]))
    corpus = shards.open_corpus(Path("data"))
    assert corpus.train[0].where(9) == (Path("data/b.bin"), 19)
    assert corpus.train[0].where(10) == (Path("data/a.bin"), 100)
    for place in range(31):  # of the second row
        ids = np.arange(1000, dtype="<u2") % 257
        ids[100 - 10 + 30 + place] = 60_000
        ids[:900].tofile("data/a.bin")
        rows = loader.rows(corpus.train, [1.0], corpus.tokenizer, 30, seed=0)
        with pytest.raises(UserError, match=rf"a\.bin holds the id 60000 at position {120 + place}, "):
            rows.batch(np.array([-1, 1]))
