"""python -m trainkit.unpickle SOURCE FOLDER: a torch.save file or a DCP folder as one safetensors file. It is run with
limits, in a process of its own, because what it reads may be anybody's."""

import io
import pickle
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CPU_S = 3600
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {
        "Size",
        "device",
        *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)),
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "dict", "list"},
    "pathlib": {"PosixPath"},
}


class _OnlyPlaces(pickle.Unpickler):
    """Nothing but what says where tensors lie."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, set()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts and lists, by dotted name."""
    if isinstance(value, Tensor):
        yield prefix.removesuffix("."), value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from flat(inner, f"{prefix}{key}.")


def of_dcp(folder: Path) -> dict[str, Tensor]:
    """The tensors of a torch.distributed.checkpoint folder."""
    metadata = _OnlyPlaces(io.BytesIO((folder / ".metadata").read_bytes())).load()
    found = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in metadata.state_dict_metadata.items()
        if hasattr(facts, "size")
    }
    for index, place in metadata.storage_data.items():
        if index.fqn in found:
            file = (folder / place.relative_path).resolve()
            if file.parent != folder.resolve():
                raise ValueError(f"{place.relative_path} lies outside of it")
            with file.open("rb") as opened:
                opened.seek(place.offset)
                part = torch.load(io.BytesIO(opened.read(place.length)), map_location="cpu", weights_only=True)
            begin = index.offset or (0,) * part.ndim
            found[index.fqn][tuple(slice(b, b + n) for b, n in zip(begin, part.shape))] = part
    return found


def of_torch_save(file: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file."""
    return dict(flat(torch.load(file, map_location="cpu", weights_only=True)))


def main(source: Path, out: Path) -> None:
    """Read `source`, write the tensors into the folder `out`."""
    size = sum(f.stat().st_size for f in source.rglob("*")) if source.is_dir() else source.stat().st_size
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * size + (1 << 20), 4 * size + (1 << 20)))
    found = of_dcp(source) if source.is_dir() else of_torch_save(source)
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, out / "out.safetensors")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # one line, whatever a stranger's file makes torch raise
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
