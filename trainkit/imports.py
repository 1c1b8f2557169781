"""Weights that a run begins with where they are somebody's: `start_from=hf:NAME`, which `model=hf` sets."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.hf import encoders, names, peft, sentences, source, weights
from trainkit.learner import Learner
from trainkit.models.adapters import AdaptedLinear, adapted, fill
from trainkit.models.foreign import ForeignBackbone
from trainkit.run import Run

BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".rotary_emb.inv_freq",
    "embeddings.position_ids",
)  # what old files hold beside what was learned
PROBE = "The quick brown fox, 42 of them: naïve café\n\n  def f(x):\treturn x"


def identified(run: Run) -> str:
    """What `run.start_from` is: a hash of its config and weights, which has to be what the run began with.

    Raises:
        UserError: it is not there, another model than the run's, or not the one that it was.
    """
    folder = source.located(run.start_from or "")
    found = source.identity(folder)
    if run.start not in (None, found):
        raise UserError(
            f"start_from={run.start_from} is {found}, and the run began with {run.start}: give that, or train under "
            f"another name"
        )
    return found


def load(run: Run, learner: Learner, tokenizer: Any) -> Path:
    """Give `learner`, which has not begun, the weights of `run.start_from`; where they lay. All ranks call it, each reads
    what it needs of every tensor.

    Raises:
        UserError: they are another model's, or the data has another tokenizer's ids.
    """
    folder = source.located(run.start_from or "")
    refuse_other_ids(source.base_of(folder), tokenizer)
    read_into(learner.model, folder)
    return folder


def read_into(model: nn.Module, folder: Path) -> None:
    """Copy a folder's weights into a task's model, in place, one tensor at a time; of an adapter's folder those of its base,
    and its own.

    Raises:
        UserError: one is missing, is left over, or has another shape.
    """
    base = source.base_of(folder)
    _read_base(model, base)
    if (projection := getattr(model, "projection", None)) is not None and (said := sentences.read(base)) and said.dense:
        whole = sentences.matrix(said)
        _refuse_shape("projection.weight", whole, projection.weight)
        with torch.no_grad():
            fill(projection.weight.detach(), whole)
    if base != folder:
        _read_adapter(model, source.config_of(base)["model_type"], folder)


def _read_base(model: nn.Module, folder: Path) -> None:
    known = source.config_of(folder)
    layers = {name.removeprefix("backbone."): layer for name, layer in adapted(model)}
    state = {name: t.detach() for name, t in model.state_dict().items() if name.startswith("backbone.")}
    own = {name.removeprefix("backbone."): t for name, t in state.items()}
    inside = {f"{name}.{part}" for name, layer in layers.items() for part in layer.state_dict() if part != "bias"}
    wanted = [*(name for name in own if name not in inside), *(f"{name}.weight" for name in layers)]
    foreign = isinstance(model.backbone, ForeignBackbone)
    given = _by_transformers(wanted, known, folder) if foreign else _by_name(wanted, known, folder)
    with torch.no_grad():
        for name, whole in given:
            layer = layers.get(name.removesuffix(".weight"))
            quantized = layer is not None and layer.form is not None and name.endswith(".weight")
            if not quantized:
                _refuse_shape(name, whole, own[name])
                fill(own[name], whole.to(own[name].device, own[name].dtype))
            if layer is not None and name.endswith(".weight"):
                layer.adopt(whole if quantized else None)


def adapter_places(model: nn.Module, family: str) -> dict[str, tuple[AdaptedLinear, names.Place, list[int]]]:
    """The adapted layers of a task's model by name, with the modules of theirs that each is and the rows of each."""
    found = {}
    for name, layer in adapted(model):
        bare = name.removeprefix("backbone.")
        if isinstance(model.backbone, ForeignBackbone):
            found[bare] = layer, names.Place((bare.removeprefix("inner."),)), [0]
        else:
            place = names.place(f"{bare}.weight", family)
            found[bare] = layer, place, names.rows(bare, model.backbone.cfg)  # type: ignore[union-attr]  # our own
    return found


def _read_adapter(model: nn.Module, family: str, folder: Path) -> None:
    given = peft.tensors(folder)
    used: set[str] = set()
    with torch.no_grad():
        for layer, place, sizes in adapter_places(model, family).values():
            own = {"lora_a": layer.lora_a.detach().clone(), "lora_b": layer.lora_b.detach().clone()}
            own |= {} if layer.magnitude is None else {"magnitude": layer.magnitude.detach().clone()}
            used |= peft.put(given, place, own, sizes)
            for part, tensor in own.items():
                fill(getattr(layer, part), tensor)
    if odd := sorted(given.keys() - used):
        raise UserError(f"{folder} has a tensor {odd[0]}, and this model nothing that it could be beside")


def refuse_other_ids(folder: Path, tokenizer: Any) -> None:
    """Raise UserError where the data's tokenizer gives other ids than the model's own: it would know no word."""
    from trainkit.data.pretrained import tokenizer_at

    try:
        theirs = tokenizer_at(folder)
    except UserError:
        return  # a model without one
    if theirs.encode(PROBE).tolist() != tokenizer.encode(PROBE).tolist():
        raise UserError(
            f"{folder} reads the tokens of its own tokenizer and this data has {tokenizer.name}: give the data "
            f"data.tokenizer.kind=hf data.tokenizer.path={folder}"
        )


def _by_name(wanted: list[str], known: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Our decoder's tensors, of a family's in a folder's files."""
    with weights.opened(folder) as given:
        for name, there in _places(wanted, known, given, folder).items():
            yield name, there.join([given.get(n) for n in there.names])


def _by_transformers(wanted: list[str], known: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model that is transformers' own, which may store them otherwise than it holds them."""
    from transformers import AutoModelForCausalLM

    weights.files(folder)  # refuses pickles
    both: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    read, said = both
    if missing := sorted(said["missing_keys"]):
        raise UserError(f"{folder} has no tensor {missing[0]}, which its config ({known['model_type']}) speaks of")
    state = read.state_dict()
    for name in wanted:
        yield name, state[name.removeprefix("inner.")]


def _places(
    wanted: list[str], known: Mapping[str, Any], given: weights.Tensors, folder: Path
) -> dict[str, names.Place]:
    family = known["model_type"]
    skipped = encoders.skipped(known) if family in encoders.DEFAULTS else 0
    try:
        places = names.gathered(wanted, family, given.__contains__, skipped)
    except KeyError as error:
        raise UserError(f"{folder} has no tensor {error.args[0]}, which its config speaks of") from error
    used = {name for there in places.values() for name in there.names}
    left = _more(given, used, "head.weight" in places)
    left = [name for name in left if family not in encoders.DEFAULTS or not name.startswith(names.HEADS)]
    if odd := sorted(left):
        raise UserError(
            f"{folder} has a tensor {odd[0]}, of which its config says nothing: it is another model than it says"
        )
    return places


def _more(given: Iterable[str], used: set[str], has_head: bool) -> list[str]:
    """The tensors that nothing reads, but for buffers, and the head where it is the embedding."""
    left = [name for name in given if name not in used and not name.endswith(BUFFERS)]
    return [name for name in left if has_head or name != "lm_head.weight"]


def _refuse_shape(name: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise UserError(
            f"{name} is {tuple(theirs.shape)} in the model that is read and {tuple(ours.shape)} in this one"
        )
