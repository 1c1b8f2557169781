"""A model of vectors as the folder that sentence-transformers opens: what `export` writes of task=embedding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainkit.data import exported
from trainkit.data.pair_corpus import PairRows
from trainkit.data.tokenizers import Tokenizer
from trainkit.errors import UserError
from trainkit.hf import sentences
from trainkit.models import Foreign
from trainkit.run import Run
from trainkit.tasks.embedding import Embedding

USE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name!r})
vectors = model.encode(["a text", "another one"])
print(model.similarity(vectors, vectors))"""


def is_table(run: Run) -> bool:
    """Whether its model is a table of vectors, one a token.

    Raises:
        UserError: it is one that sentence-transformers would read in another way.
    """
    task, data = _parts(run)
    if isinstance(run.model, Foreign) or run.model.depth:
        return False
    plain = (run.model.norm, run.model.position, run.model.embed_norm) == ("none", "none", False)
    if not plain or task.pooling != "mean" or data.specials != "none":
        raise UserError(
            f"{run.name} cannot be exported: a StaticEmbedding is a mean of vectors and no more, and this one has "
            f"model.norm={run.model.norm}, model.position={run.model.position}, task.pooling={task.pooling} and "
            f"data.specials={data.specials}"
        )
    return True


def table(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a StaticEmbedding."""
    return {"embedding.weight": backbone["embed.weight"]}


def bare(described: dict[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A language model without its head, under the names that it has then."""
    (name,) = described["architectures"]
    architectures = [name.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")]
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("lm_head.")}
    return {**described, "architectures": architectures}, {
        key.removeprefix("model.").removeprefix("transformer."): tensor for key, tensor in kept.items()
    }


def write(place: Path, model: nn.Module, run: Run, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Into `place`: modules.json and what belongs to it, and a tokenizer that puts around a text what this one learned."""
    task, data = _parts(run)
    width, into = run.model.width, task.projection
    if is_table(run):
        made = sentences.static_files(into, width, data.prompts)
    else:
        made = sentences.files(task.pooling, width, into, data.length, data.prompts)
    made["tokenizer.json"] = around(exported.tokenizer_json(tokenizer), data.specials, tokenizer.eos).encode()
    for name, content in made.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    if into:
        dense = next(place.glob(f"*_{sentences.DENSE}"))
        projection = model.get_parameter("projection.weight").detach()
        save_file({"linear.weight": projection.to(dtype)}, dense / "model.safetensors", metadata={"format": "pt"})


def _parts(run: Run) -> tuple[Embedding, PairRows]:
    """Its task and its data, which those of vectors are."""
    assert isinstance(run.task, Embedding)
    assert isinstance(run.data, PairRows)
    return run.task, run.data


def around(text: str, specials: str, eos: int) -> str:
    """A tokenizer.json which puts around a text what `data.specials` says."""
    said = json.loads(text)
    if specials == "none":
        said["post_processor"] = None
    elif specials == "end":
        end = next(t["content"] for t in said["added_tokens"] if t["id"] == eos)
        piece = {"SpecialToken": {"id": end, "type_id": 0}}
        one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        said["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [one, piece],
            "pair": [one, piece, other, piece],
            "special_tokens": {end: {"id": end, "ids": [eos], "tokens": [end]}},
        }
    return json.dumps(said, ensure_ascii=False)
