"""An optimizer whose states, and whose arithmetic, are on the CPU: gradients go over, weights come back."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.optimizers.sharded import beside, format_of, local

BUCKET_BYTES = 64 << 20


class Offloaded(torch.optim.Optimizer):
    """`build(model)` gives the optimizer of the copies of a model's parameters that are kept on the CPU; this one's
    groups hold the model's own, and its state is that of the copies.

    A step goes bucket by bucket: while the CPU makes one bucket's update, the next one's gradients come over and the last
    one's weights go back, each on a stream of its own. Two buckets of gradients are on the CPU at most.
    """

    keeps_on = torch.device("cpu")

    def __init__(self, model: nn.Module, build: Callable[[Any], torch.optim.Optimizer]) -> None:
        self._copies = {p: _copy(p) for p in model.parameters() if p.requires_grad}
        names = {name: self._copies[p] for name, p in model.named_parameters() if p in self._copies}
        self.inner = build(_Named(names))
        of_copy = {copy: p for p, copy in self._copies.items()}
        groups = [{**g, "params": [of_copy[c] for c in g["params"]]} for g in self.inner.param_groups]
        super().__init__(groups, {})
        self.state = _Theirs(self._copies, self.inner.state)  # type: ignore[assignment]
        self._buckets = _buckets(list(self._copies))
        self._device = local(next(iter(self._copies))).device
        cuda = self._device.type == "cuda"
        self._over, self._back = (torch.cuda.Stream(self._device) if cuda else None for _ in range(2))
        self._moved, self._waited_s = 0, 0.0
        model.memory_stats = [*getattr(model, "memory_stats", []), self.stats]  # type: ignore[assignment]

    def stats(self) -> dict[str, float]:
        """Gigabytes of gradients and weights that moved, and seconds that the CPU waited for gradients, since the last call."""
        found = {"offload_optimizer_gb": self._moved / 1e9, "offload_optimizer_wait_s": self._waited_s}
        self._moved, self._waited_s = 0, 0.0
        return found

    def format_of(self, parameter: Tensor) -> str | None:
        """The format that this parameter's states are kept in."""
        return format_of(self.inner, self._copies[parameter])  # type: ignore[index]

    def reread(self) -> None:
        """Take over weights that somebody else has changed."""
        with torch.no_grad():
            for p, copy in self._copies.items():
                local(copy).copy_(local(p))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs |= {key: value for key, value in ours.items() if key != "params"}
        if self._over is not None and self._back is not None:
            now = torch.cuda.current_stream(self._device)
            self._over.wait_stream(now)  # until the gradients are there
            self._back.wait_stream(now)  # until nobody reads the weights any more
        coming = self._fetch(0)
        for number, bucket in enumerate(self._buckets):
            grads, arrived = coming
            coming = self._fetch(number + 1)
            if arrived is not None:
                begin = time.perf_counter()
                arrived.synchronize()
                self._waited_s += time.perf_counter() - begin
            for p, grad in zip(bucket, grads, strict=True):
                self._copies[p].grad = grad
            self.inner.step()
            for p in bucket:
                self._copies[p].grad = None
            with torch.cuda.stream(self._back):  # of None, on a CPU, this is nothing
                for p in bucket:
                    local(p).copy_(local(self._copies[p]), non_blocking=True)
            self._moved += sum(local(tensor).nbytes for tensor in (*bucket, *grads) if tensor is not None)
        if self._back is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._back)

    def _fetch(self, number: int) -> tuple[list[Tensor | None], Any]:
        """The gradients of a bucket on the CPU, and the event after which they are there."""
        if number >= len(self._buckets):
            return [], None
        with torch.cuda.stream(self._over):
            grads = [_on_cpu(p, p.grad) for p in self._buckets[number]]
            return grads, None if self._over is None else self._over.record_event()


def _copy(p: Tensor) -> nn.Parameter:
    copy = nn.Parameter(_on_cpu(p, p.detach()))  # type: ignore[arg-type]  # a tensor gives a tensor
    copy.grad_dtype = p.grad_dtype
    return copy


def _on_cpu(p: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A copy of `tensor`, which is as large as `p`, in host memory: page-locked where it comes from a GPU."""
    if tensor is None:
        return None
    here = local(tensor)
    copy = torch.empty(here.shape, dtype=here.dtype, pin_memory=here.is_cuda).copy_(here, non_blocking=True)
    return beside(p, copy, p.shape[-1])


def _buckets(parameters: Sequence[Any]) -> list[list[Any]]:
    found: list[list[Any]] = [[]]
    size = 0
    for p in parameters:
        if found[-1] and size + local(p).nbytes > BUCKET_BYTES:
            found.append([])
            size = 0
        found[-1].append(p)
        size += local(p).nbytes
    return found


class _Named:
    """As much of a module as an optimizer is built from."""

    def __init__(self, names: dict[str, nn.Parameter]) -> None:
        self._names = names

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._names.items())

    def parameters(self) -> list[nn.Parameter]:
        return list(self._names.values())


class _Theirs(dict[Any, Any]):
    """The state of the copies, by the parameters that they are copies of."""

    def __init__(self, copies: dict[Any, Any], state: Any) -> None:
        super().__init__()
        self._copies, self._state = copies, state

    def __getitem__(self, key: Any) -> Any:
        return self._state[self._copies[key]]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state[self._copies[key]] = value

    def __contains__(self, key: Any) -> bool:
        return key in self._copies and self._copies[key] in self._state
