"""A checkpoint as a folder that transformers opens: the verb `export`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainkit import __version__, imports
from trainkit import export_vectors as vectors
from trainkit import run as runs
from trainkit.benchmark.picture import can_draw
from trainkit.checkpoint import Loaded
from trainkit.data import exported
from trainkit.data.tokenizers import Tokenizer
from trainkit.errors import UserError, nearest
from trainkit.hf import card, families, folder, names, peft, source, to_gguf
from trainkit.hf import push as hub
from trainkit.hf.sentences import STATIC
from trainkit.learner import load_model
from trainkit.models import Foreign, adapters
from trainkit.opened import opened, tokenizer_of
from trainkit.run import Run
from trainkit.strict import parse_json
from trainkit.tracking.jsonl import NAME as METRICS
from trainkit.units import human_bytes, human_count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})
ids = tokenizer({prompt!r}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))"""
USE_ENCODER = """from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained({name!r})
tokenizer = AutoTokenizer.from_pretrained({name!r})
print(model(**tokenizer({prompt!r}, return_tensors="pt")).last_hidden_state)"""


def export(
    which: str,
    out: Path,
    root: Path,
    *,
    dtype: str,
    adapter: bool = False,
    gguf: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> None:
    """Write the model of `which` into `out`, an adapter added to its base or (`adapter`) alone, and say what to do with it.

    Raises:
        UserError: `out` is there, or no architecture of transformers is this model.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is none{nearest(dtype, DTYPES)}")
    if gguf is not None and gguf not in to_gguf.FORMS:
        raise UserError(f"--gguf {gguf} is none{nearest(gguf, to_gguf.FORMS)}")
    if adapter and gguf:
        raise UserError(
            "--gguf writes a whole model, and --adapter only what was learned beside one: give one of the two"
        )
    if push is not None:
        hub.check(push)
    folder.refuse_what_is_there(out)
    loaded, run = opened(which, root)
    of_texts = run.task.takes == "pairs"
    if of_texts and (adapter or gguf):
        raise UserError(f"{run.name} makes vectors, which are written whole: leave --adapter and --gguf out")
    model = run.task.build(run.model.build())
    load_model(model, loaded.tensors)
    if adapter:
        with folder.made(out) as place:
            base = _write_adapter(model, run, place)
        print(f"{out} holds the adapter of {run.name}, beside {base}. What to try next:")
        print(f"  trainkit generate hf:{out} --prompt 'Call me'")
        _pushed(out, push, private, run, loaded)
        return
    with folder.made(out) as place:
        described, tensors = _model(model, run)
        if gguf is not None:
            to_gguf.check(described)
        whole = tensors
        tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in tensors.items()}
        folder.write_tensors(place, tensors)
        tokenizer = tokenizer_of(loaded)
        for name, content in exported.files(tokenizer, run.model.context).items():
            (place / name).write_bytes(content)
        ends = _ends(tokenizer)
        described |= ends | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        if run.task.writes:
            described["use_cache"] = True
            _write_json(place / "generation_config.json", ends)
        if "model_type" in described:
            _write_json(place / source.CONFIG, described)
        if of_texts:
            vectors.write(place, model, run, tokenizer, DTYPES[dtype])
        if gguf is not None:
            file, text = place / f"model-{gguf}.gguf", exported.tokenizer_json(tokenizer)
            template = getattr(tokenizer, "words", {}).get("template")
            to_gguf.write(file, described, whole, text, ends, template, gguf, out.name)
        rows = _metrics(loaded)
        drawn = _draw(rows, place / "loss.png")
        (place / "README.md").write_text(_card(loaded, run, rows, drawn, out.name))
        (place / runs.FILE).write_text(run.yaml())
    size = sum(t.nbytes for t in tensors.values())
    print(
        f"{out} holds {run.name} as {described['architectures'][0]}, {human_bytes(size)} in {dtype}. What to try next:"
    )
    if of_texts:
        print(
            f"  python -c \"from sentence_transformers import SentenceTransformer as S; print(S('{out}').encode('Hi'))\""
        )
    elif run.task.writes:
        print(
            f"  python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}')('Call me'))\""
        )
        print(f"  trainkit train model=hf model.name={out} data=text data.path=A_FOLDER")
    else:
        print(f"  trainkit train task=embedding model=hf model.name={out} data=pairs data.path=PAIRS.tsv")
    _pushed(out, push, private, run, loaded)


def _pushed(out: Path, repository: str | None, private: bool, run: Run, loaded: Loaded) -> None:
    if repository is not None:
        message = f"{run.name} at step {loaded.step}, by trainkit {__version__}"
        print(f"it is at {hub.push(out, repository, private=private, message=message)}")


def _model(model: nn.Module, run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the tensors of a task's model, under transformers' names."""
    state = {
        name.removeprefix("backbone."): t for name, t in adapters.merged(model).items() if name.startswith("backbone.")
    }
    if run.task.takes == "pairs" and vectors.is_table(run):
        return {"architectures": [STATIC]}, vectors.table(state)
    if isinstance(run.model, Foreign):
        known = dict(run.model.config or {})
        known.setdefault("architectures", [type(model.backbone.inner).__name__])
        return known, _untied({name.removeprefix("inner."): t for name, t in state.items()})
    try:
        described = families.config(run.model)
    except families.Unlike as why:
        raise UserError(f"{run.name} cannot be exported: no architecture of transformers is it; {why}") from why
    tensors = names.theirs(state, run.model, described["model_type"])
    return (described, tensors) if run.task.writes else vectors.bare(described, tensors)


def _write_adapter(model: nn.Module, run: Run, place: Path) -> str:
    """PEFT's files of a run's adapter; the model that it is beside."""
    if run.model.adapter is None or not source.is_source(run.start_from):
        raise UserError(
            f"--adapter is of a run with a model.adapter that began with model=hf: {run.name} has none, or began with "
            f"{run.start_from}, of which others know nothing"
        )
    base = (run.start_from or "").removeprefix(source.PREFIX)
    base = str(source.base_of(source.located(base))) if Path(base).exists() else base
    foreign = isinstance(run.model, Foreign)
    family = "" if foreign else families.config(run.model)["model_type"]
    places = imports.adapter_places(model, family)
    layers = {}
    for name, (layer, _, _) in places.items():
        own = {"lora_a": layer.lora_a.detach(), "lora_b": layer.lora_b.detach()}
        layers[name] = own | ({} if layer.magnitude is None else {"magnitude": layer.magnitude.detach()})
    where = {name: place for name, (_, place, _) in places.items()}
    tensors = peft.theirs(layers, where, {name: rows for name, (_, _, rows) in places.items()})
    modules = [module.removesuffix(".weight") for place in where.values() for module in place.names]
    _write_json(place / peft.CONFIG, peft.described(run.model.adapter, modules, base, conv=family == "gpt2"))
    save_file(tensors, place / peft.FILE, metadata={"format": "pt"})
    (place / runs.FILE).write_text(run.yaml())
    return base


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which no two names are one tensor: the later ones are tied to the first when it is loaded."""
    seen: dict[tuple[int, Any], str] = {}
    for name, tensor in state.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: state[name] for name in seen.values()}


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that begin and end a text, and fill a row."""
    words: Mapping[str, str] = getattr(tokenizer, "words", {})
    ids = {"eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
    for kind in ("bos", "pad"):
        if kind in words and (found := tokenizer.id_of(words[kind])) is not None:  # type: ignore[attr-defined]  # a JsonTokenizer
            ids[f"{kind}_token_id"] = found
    return ids


def _metrics(loaded: Loaded) -> list[dict[str, Any]]:
    """The steps that the run logged before this checkpoint, where its folder is at hand."""
    file = loaded.path.parent.parent / METRICS
    if loaded.step == 0 or not file.is_file():
        return []
    lines = [line for line in file.read_bytes().splitlines() if line.endswith(b"}")]
    rows = [parse_json(line, max_bytes=1 << 16) for line in lines]
    return [row for row in rows if isinstance(row, dict) and row.get("step", loaded.step + 1) <= loaded.step]


def _draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """A picture of the losses, where there is a matplotlib and something to draw."""
    if len(rows) < 2 or not can_draw():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for key, how in (("loss", {"alpha": 0.6}), ("val_loss", {"marker": "o"})):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points), label=key, **how)
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
    axes.legend()
    figure.savefig(path)
    return True


def _card(loaded: Loaded, run: Run, rows: list[dict[str, Any]], drawn: bool, name: str) -> str:
    data, of_texts = loaded.state.get("data", {}), run.task.takes == "pairs"
    facts = {
        "Parameters": human_count(run.model.parameters()),
        "Step": f"{loaded.step} of {run.steps}",
        "Began with": run.start or "fresh weights",
        "Data": f"{data.get('name', 'none yet')} (fingerprint `{data.get('fingerprint', '')[:16]}`)",
        "Tokenizer": data.get("tokenizer", {}).get("name", "its own"),
        "Tokens seen": human_count(loaded.step * run.data.batch * run.data.length),
    }
    return card.text(
        name=name,
        task="text-generation" if run.task.writes else "sentence-similarity" if of_texts else "feature-extraction",
        library="sentence-transformers" if of_texts else "transformers",
        facts=facts,
        metrics=rows,
        run=run.yaml(),
        base=(run.start_from or "").removeprefix(source.PREFIX) if source.is_source(run.start_from) else None,
        version=__version__,
        picture=drawn,
        use=(USE if run.task.writes else vectors.USE if of_texts else USE_ENCODER).format(name=name, prompt="Call me"),
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
