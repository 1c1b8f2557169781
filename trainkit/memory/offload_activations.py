"""Keep what blocks save for backward in host memory, and bring it back just before backward needs it.

Grade: exact. A GPU copies beside the computation, through pinned memory: two blocks may be leaving at once, and while one
block is in backward the tensors of the one before it are coming. The last block's stay, for they are needed at once, and
so do parameters, what all blocks share, and what is small. Each storage moves once, however many tensors look at it. On a
CPU everything lies in host memory already: what would move is counted, and nothing is copied.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from trainkit.config import NonNegative, config
from trainkit.memory.lanes import HostLanes, lanes


@config
class OffloadActivations:
    """`above_mb`: storages of more than so many megabytes move. Under autocast, the copies of weights in the narrow format
    are activations too."""

    grade: ClassVar[str] = "exact"
    above_mb: NonNegative = 1.0

    def apply(self, model: nn.Module, *, compiled: bool = False) -> nn.Module:
        """`model` whose blocks' activations lie in host memory between forward and backward."""
        traffic = Traffic(round(self.above_mb * 1e6), lanes)
        traffic.direct(list(model.backbone.blocks), compiled)  # type: ignore[union-attr, arg-type]  # a ModuleList
        model.memory_stats = [*getattr(model, "memory_stats", []), traffic.stats]  # type: ignore[assignment]
        return model


class Traffic:
    """What leaves and what comes back, block by block. A pass is one forward and its backward."""

    def __init__(self, above: int, lanes: Callable[[torch.device], HostLanes]) -> None:
        self._above, self._lanes_of = above, lanes
        self._lanes = HostLanes()  # until the first block says where it computes
        self._moved = 0
        self._load: Load | None = None  # of the block before, in this pass
        self._seen: weakref.WeakValueDictionary[tuple[int, int], Parcel] = weakref.WeakValueDictionary()

    def direct(self, blocks: list[nn.Module], compiled: bool) -> None:
        """Let the saved tensors of all `blocks` but the last go through here. Where they are compiled, what is inside
        is, and saves its tensors through the hooks."""
        for number, block in enumerate(blocks):
            last = number == len(blocks) - 1
            run = self._last(block.forward) if last else self._moving(block, block.forward, number == 0)
            block.forward = torch.compiler.disable(run, recursive=False) if compiled else run

    def stats(self) -> dict[str, float]:
        """Gigabytes that moved, out and back, and seconds that the device waited for them, since the last call."""
        moved, self._moved = self._moved, 0
        return {"offload_gb": moved / 1e9, "offload_wait_s": self._lanes.waited_s()}

    def _moving(self, block: nn.Module, forward: Callable[..., Any], first: bool) -> Callable[..., Any]:
        @wraps(forward)
        def run(x: Tensor, *shared: Any, **more: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(x, *shared, **more)
            if first:
                self._begin(x.device)
            load = self._load = Load(self._load)
            # FSDP puts other parameters in for a forward, so that they are looked up anew
            stay = {t.untyped_storage()._cdata for t in (*block.parameters(), *_tensors(shared))}
            with saved_tensors_hooks(lambda tensor: self._pack(tensor, load, stay), self._unpack):
                y = forward(x, *shared, **more)
            self._lanes.settle(keep=1)
            return y

        return run

    def _begin(self, device: torch.device) -> None:
        if not self._lanes.serve(device):
            self._lanes = self._lanes_of(device)
        self._load = None
        self._seen.clear()

    def _last(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            y = forward(*args, **kwargs)
            load, self._load = self._load, None
            if load is not None and y.requires_grad:
                self._lanes.settle(keep=0)
                y.register_hook(lambda grad: self._bring(load))
            return y

        return run

    def _pack(self, tensor: Tensor, load: "Load", stay: set[int]) -> "Tensor | Saved":
        if not _plain(tensor):
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() <= self._above or storage._cdata in stay:
            return tensor
        key = storage._cdata, tensor._version
        parcel = self._seen.get(key)
        if parcel is None:
            parcel = self._seen[key] = Parcel(self._lanes.send(storage), storage, load)
            load.parcels.append(weakref.ref(parcel))
            self._moved += storage.nbytes()
        return Saved(parcel, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: "Tensor | Saved") -> Tensor:
        if not isinstance(saved, Saved):
            return saved
        load = saved.parcel.load
        self._bring(load)
        if load.before is not None:
            self._bring(load.before)
        return _looked_at(saved.parcel.arrived(self._lanes), saved)

    def _bring(self, load: "Load") -> None:
        """Begin to bring back all that is still needed of a block, once."""
        for reference in load.parcels:
            parcel = reference()
            if parcel is not None and parcel.coming is None:
                parcel.coming = self._lanes.fetch(parcel.sent)
                self._moved += parcel.bytes
        load.parcels = []


class Load:
    """What one block's forward sent out, and the block before it in the same pass."""

    def __init__(self, before: "Load | None") -> None:
        self.before = before
        self.parcels: list[weakref.ref[Parcel]] = []


class Parcel:
    """A storage that was sent out. It lives as long as something saved looks at it, and so does its copy on the device."""

    def __init__(self, sent: Any, storage: UntypedStorage, load: Load) -> None:
        self.sent, self.load, self.bytes = sent, load, storage.nbytes()
        self.coming: Any = None
        self._here: UntypedStorage | None = None
        self._source = StorageWeakRef(storage)  # no other storage gets this one's identity while a parcel stands for it

    def arrived(self, ways: HostLanes) -> UntypedStorage:
        """The storage on the device."""
        if self._here is None:
            self._here = ways.wait(self.coming)
        return self._here


class Saved(NamedTuple):
    """A tensor that autograd saved: how it looks at a storage that was sent out."""

    parcel: Parcel
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _plain(tensor: Tensor) -> bool:
    """Whether a storage is all that there is to a tensor."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def _looked_at(storage: UntypedStorage, saved: Saved) -> Tensor:
    whole = torch.empty(0, dtype=saved.dtype, device=storage.device)
    return whole.set_(storage, saved.offset, saved.size, saved.stride)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
