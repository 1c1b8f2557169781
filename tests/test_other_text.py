"""`trainkit evaluate` on other text than the run's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TEXT
from trainkit import build, use
from trainkit.errors import UserError
from trainkit.opened import opened

OTHER = ["data=text", "data.path=other", "data.length=32", "data.validation=0.5"]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_it_is_read_with_the_tokenizer_of_the_checkpoint(
    kind: str, trained: Callable[..., build.Trainer], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(f"data.tokenizer.kind={kind}", "data.tokenizer.vocab=280", "model.vocab=280", name="a")
    Path("other").mkdir()
    for i in range(8):  # a BPE of its own would be another one
        Path("other", f"{i}.txt").write_text(f"{i} " + TEXT[::-1] * 2)

    def found(*words: str) -> dict[str, float]:
        capsys.readouterr()
        use.evaluate("a", [*OTHER, *words], Path("runs"), quantize=None, as_json=True)
        return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

    said = found()
    assert said["val_loss"] > 0
    loaded, _ = opened("a", Path("runs"))
    if kind == "bpe":
        named = ["data.tokenizer.kind=file", f"data.tokenizer.path={loaded.path}/tokenizer.json"]
        assert found(*named)["val_loss"] == said["val_loss"]
        with pytest.raises(UserError, match="trained with the tokenizer bpe and this data has bytes"):
            found("data.tokenizer.kind=bytes")
    else:
        assert found("data.tokenizer.kind=bytes")["val_loss"] == said["val_loss"]
