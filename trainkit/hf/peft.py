"""Adapters in the folders of the PEFT library: adapter_config.json and adapter_model.safetensors, both ways.

Ours is one adapter over queries, keys and values, PEFT's is one for each: of one of ours come three with the same first factor,
and three of theirs become one of three times the rank, or of the same where their first factors are equal.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.hf import names
from trainkit.strict import parse_json, read_file, reason

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_JSON = 1 << 20
BEFORE = "base_model.model."
Factors = dict[str, Tensor]  # lora_a (rank, in), lora_b (out, rank) and, of DoRA, magnitude (out,)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG).is_file()


def config_of(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of it.

    Raises:
        UserError: it is no LoRA or DoRA of one rank.
    """
    try:
        said = parse_json(read_file(folder / CONFIG, MAX_JSON), max_bytes=MAX_JSON)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {reason(error)}") from error
    if not isinstance(said, dict) or said.get("peft_type") != "LORA" or not isinstance(said.get("r"), int):
        raise UserError(f"{folder} is no LoRA or DoRA adapter, and other kinds are not known here")
    usually: dict[str, Any] = {"bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for key, usual in usually.items():
        if said.get(key, usual) not in (usual, None, [], {}):
            raise UserError(f"{folder} has {key}={said[key]} in its {CONFIG}, which an adapter here cannot be")
    return said


def fields(folder: Path, *, fused: bool) -> dict[str, Any]:
    """The fields of `model.adapter` that an adapter's folder stands for, as YAML would hold them. `fused` says whether the
    model is ours, of which one layer is several of theirs."""
    said, given = config_of(folder), tensors(folder)
    many = 1 if not fused or all(_shared(given, layer) for layer in _layers(given)) else 3
    rank = said["r"] * many
    scale = said["lora_alpha"] / (math.sqrt(said["r"]) if said.get("use_rslora") else said["r"])
    kinds = {"attention" if "attn" in layer else "mlp" for layer in _layers(given)}
    return {
        "kind": "dora" if said.get("use_dora") else "lora",
        "rank": rank,
        "alpha": float(scale * rank),
        "dropout": float(said.get("lora_dropout") or 0.0),
        "targets": kinds.pop() if len(kinds) == 1 else "all",
    }


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder by name, without what PEFT puts before them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / FILE).is_file():
        raise UserError(f"{folder} holds no {FILE}: save the adapter as safetensors")
    try:
        given = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / FILE} cannot be read: {error}") from error
    return {name.removeprefix(BEFORE): tensor for name, tensor in given.items()}


def described(adapter: Any, modules: Sequence[str], base: str, conv: bool) -> dict[str, Any]:
    """The adapter_config.json of an adapter beside the modules of these names; `conv` says whether they are GPT-2's, which
    hold their weights input-first."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.kind == "dora",
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
        "fan_in_fan_out": conv,
        "inference_mode": True,
    }


def theirs(
    layers: Mapping[str, Factors], where: Mapping[str, names.Place], rows: Mapping[str, Sequence[int]]
) -> Factors:
    """PEFT's tensors of our adapters. `where` says which modules a layer of ours is, and `rows` how many of its rows each."""
    out: Factors = {}
    for name, own in layers.items():
        modules = [module.removesuffix(".weight") for module in where[name].names]
        sizes = list(rows[name]) if len(modules) > 1 else [len(own["lora_b"])]
        for module, part in zip(modules, own["lora_b"].split(sizes), strict=True):
            out[f"{BEFORE}{module}.lora_A.weight"] = own["lora_a"].clone()
            out[f"{BEFORE}{module}.lora_B.weight"] = part.clone()
        if "magnitude" in own:
            for module, part in zip(modules, own["magnitude"].split(sizes), strict=True):
                out[f"{BEFORE}{module}.lora_magnitude_vector"] = part.clone()
    return out


def put(given: Mapping[str, Tensor], place: names.Place, own: Factors, sizes: Sequence[int]) -> set[str]:
    """Write into one of our adapters, in place, what PEFT's tensors say of its modules; the names that were used. A module that
    they leave out has learned nothing yet.

    Raises:
        UserError: a tensor has another shape.
    """
    modules = [module.removesuffix(".weight") for module in place.names]
    sizes = list(sizes) if len(modules) > 1 else [len(own["lora_b"])]
    used, begin, first = set(), 0, 0
    own["lora_b"].zero_()
    shared = _shared_among(given, modules)
    for module, size in zip(modules, sizes, strict=True):
        a, b = given.get(f"{module}.lora_A.weight"), given.get(f"{module}.lora_B.weight")
        if a is not None and b is not None:
            rank = len(a)
            if a.shape[1:] != own["lora_a"].shape[1:] or tuple(b.shape) != (size, rank):
                raise UserError(f"the adapter's {module} is of another model: {tuple(b.shape)} x {tuple(a.shape)}")
            own["lora_a"][first : first + rank] = a.to(own["lora_a"])
            own["lora_b"][begin : begin + size, first : first + rank] = b.to(own["lora_b"])
            first += 0 if shared else rank
            used |= {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
        if (length := given.get(f"{module}.lora_magnitude_vector")) is not None and "magnitude" in own:
            own["magnitude"][begin : begin + size] = length.to(own["magnitude"]).flatten()
            used.add(f"{module}.lora_magnitude_vector")
        begin += size
    return used


def _layers(given: Mapping[str, Tensor]) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in given})


def _shared(given: Mapping[str, Tensor], layer: str) -> bool:
    """Whether what stands with a layer in one of ours has the same first factor."""
    for group in names.TOGETHER:
        for own in group:
            if layer.endswith(own):
                return _shared_among(given, [layer.removesuffix(own) + other for other in group])
    return True


def _shared_among(given: Mapping[str, Tensor], modules: Sequence[str]) -> bool:
    factors = [a for module in modules if (a := given.get(f"{module}.lora_A.weight")) is not None]
    return all(torch.equal(a, factors[0]) for a in factors[1:])
