"""Updates of parameters that are stored in bfloat16.

A bfloat16 number has 8 bits, so that an update below a 512th of its weight is lost when the sum is rounded to nearest. Here
the arithmetic of any optimizer is in float32, and what is written back is, by choice:

- `stochastic`: the neighbour above or below, drawn so that the mean is right (Gupta et al. 2015, arXiv:1502.02551; in
  bfloat16 training Zamirai et al. 2020, arXiv:2010.06192);
- `nearest`: the nearest, for comparison;
- `master`: the nearest, of a float32 copy that the optimizer keeps and goes on from.

The draw is a function of (seed, step, name of the parameter, place in the whole tensor), by an integer hash: it is the same on
every device, and however the parameter is sliced over ranks.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.optimizers.muon import Both

Rounding = Literal["stochastic", "nearest", "master"]
BUCKET = 1 << 24  # numbers of which float32 copies are made at once, 64 MiB
CHUNK = 1 << 18  # numbers that are drawn for at once on a CPU: they stay in its cache
MASTER = "master"
_LOW = 0xFFFF  # the bits that bfloat16 drops of float32


def rounded(optimizer: torch.optim.Optimizer, model: nn.Module, rounding: Rounding | None) -> torch.optim.Optimizer:
    """`optimizer`, built for the bfloat16 parameters of `model`, with its arithmetic in float32; as it is for None."""
    if rounding is None:
        return optimizer
    if isinstance(optimizer, Both):
        return Both(*(rounded(part, model, rounding) for part in optimizer.parts))
    return Wide(optimizer, {p: name for name, p in model.named_parameters()}, rounding)


class Wide(torch.optim.Optimizer):
    """An optimizer that steps on float32 copies of its parameters and gradients, bucket by bucket, and writes the result
    back. Its groups are those of `inner`; the state is float32 and stands under the real parameters.

    `key` says which step it is, for the draw: `trainkit.optimizers.begin` sets it.
    """

    def __init__(self, inner: torch.optim.Optimizer, names: Mapping[Tensor, str], rounding: Rounding) -> None:
        self._inner, self._names, self._rounding = inner, names, rounding
        self._step_supports_amp_scaling = getattr(inner, "_step_supports_amp_scaling", False)
        self.key = 0
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups  # the same, not copies: a learning rate set there is set here

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self._step_supports_amp_scaling:
            self._inner.grad_scale, self._inner.found_inf = None, getattr(self, "found_inf", None)  # type: ignore[attr-defined]
        for group in self.param_groups:
            for parameters in _buckets([p for p in group["params"] if p.grad is not None]):
                self._step_on(parameters, group)

    def _step_on(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        copies = {p: self.state[p].get(MASTER) for p in parameters}
        wide = {p: p.detach().float() if copy is None else copy for p, copy in copies.items()}
        for p, copy in wide.items():
            copy.grad = p.grad.float()  # type: ignore[union-attr]  # those without were left out
        own = {copy: self.state[p] for p, copy in wide.items() if self.state[p]}
        self._inner.param_groups, self._inner.state = [{**group, "params": list(wide.values())}], defaultdict(dict, own)
        self._inner.step()
        for p, copy in wide.items():
            copy.grad = None
            self.state[p] = self._inner.state[copy]
            if self._rounding == "master":
                self.state[p][MASTER] = copy
            write(p, copy, mix(self.key, self._names[p]) if self._rounding == "stochastic" else None)
        self._inner.param_groups, self._inner.state = [], defaultdict(dict)  # the copies go


def write(parameter: Tensor, wide: Tensor, key: int | None) -> None:
    """Give `parameter` (bfloat16) the values of `wide` (float32, laid out alike), in place: rounded stochastically with the
    bits that belong to `key`, or to nearest for None. What bfloat16 can hold is written as it is.

    Grade of the draw: exact on any layout of slices along the first dimension.
    """
    if key is None:
        parameter.copy_(wide)
        return
    begin = _begins_at(parameter)
    into, given = (_local(t).view(-1) for t in (parameter, wide.contiguous()))
    chunk = CHUNK if into.device.type == "cpu" else BUCKET
    for i in _begins(len(given), chunk):
        some = given[i : i + chunk]
        drawn = random_bits(begin + i, len(some), key, some.device)
        up_or_down = drawn.add_(some.view(torch.int32)).bitwise_and_(~_LOW).view(torch.float32)
        into[i : i + chunk] = torch.where(some.isfinite(), up_or_down, some)


def _begins(count: int, chunk: int) -> Iterable[int]:
    return range(0, count, chunk)


def random_bits(begin: int, count: int, key: int, device: torch.device) -> Tensor:
    """`count` int32 numbers, uniform in 0 to 65535, that belong to the places from `begin` on and to `key` (63 bits).

    Two rounds of multiplying and xor-shifting (the finaliser of MurmurHash3, with the constants that Wellons found in 2018),
    half of the key before the first and half before the second.
    """
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_wrapped(begin + key))
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_wrapped(0x7FEB352D))
    x.bitwise_xor_(_wrapped(key >> 31))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_wrapped(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).bitwise_and_(_LOW)


def mix(key: int, name: str) -> int:
    """A 63-bit key from a step's and a parameter's name."""
    return int.from_bytes(hashlib.blake2b(f"{key},{name}".encode(), digest_size=8).digest(), "little") >> 1


def _wrapped(number: int) -> int:
    """A number as the int32 of its low bits."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def _local(tensor: Tensor) -> Tensor:
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a DTensor's
    return part.detach()


def _begins_at(tensor: Tensor) -> int:
    """The place in the whole tensor of the first number that this rank holds."""
    if not hasattr(tensor, "to_local"):
        return 0
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[attr-defined]  # what torch's own checkpoints ask a DTensor
    assert tuple(chunk.sizes[1:]) == tuple(tensor.shape[1:]), "slices are along the first dimension"
    return int(chunk.offsets[0]) * tensor[0].numel() if tensor.ndim > 1 else int(chunk.offsets[0])


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
