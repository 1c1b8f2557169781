"""Random generators: a seed for every step, and the state of all of them as tensors.

What is drawn in a step is seeded by (seed, step, rank) and so needs no state; the state is kept all the same, for code
between steps that draws from a global generator.
"""

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A 63-bit seed from several numbers: equal ones give equal seeds, others unrelated ones."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Begin Python's, NumPy's and torch's generators anew."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


def state() -> dict[str, Tensor]:
    """The state of Python's, NumPy's, torch's and each CUDA device's generator."""
    _, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    assert isinstance(keys, np.ndarray)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([0.0 if gauss is None else 1.0, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def load(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; the generators of devices that are not here are left out."""
    has, gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss if has else None))
    *keys, position, has_gauss = tensors["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, tensors["numpy_gauss"].item())
    )
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)
