"""The order of samples, as functions: position in, sample out, and no memory of the others."""

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
_ROUNDS = 6


def _scrambled(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): every bit of a word depends on every other."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def _keys(key: tuple[int, ...]) -> NDArray[np.uint64]:
    state = np.zeros(1, dtype=U64)
    with np.errstate(over="ignore"):
        for number in key:
            state = _scrambled(state + U64(number & 0xFFFFFFFFFFFFFFFF) + U64(0x9E3779B97F4A7C15))
        return _scrambled(state + np.arange(1, _ROUNDS + 1, dtype=U64) * U64(0x9E3779B97F4A7C15))


def permuted(index: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Where each `index` of `range(size)` goes in the pseudo-random permutation of `key`, in O(1) memory.

    A Feistel network (Luby & Rackoff 1988) over the smallest even number of bits that holds `size`, walked until it
    falls inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = U64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = U64((1 << int(half)) - 1)
    keys = _keys(key)
    out = index.astype(U64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        x = out[outside]
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (_scrambled(right ^ k) & low)
        out[outside] = (left << half) | right
        outside = out >= U64(size)
    return out.astype(np.int64)


class Shares:
    """Positions dealt to weighted sources: in every block of positions each source has its exact share, rounded."""

    BLOCK = 1024

    def __init__(self, weights: list[float]) -> None:
        exact = np.array(weights) / sum(weights) * self.BLOCK
        counts = np.floor(exact).astype(np.int64)
        largest_remainders = np.argsort(-(exact - counts), kind="stable")
        counts[largest_remainders[: self.BLOCK - counts.sum()]] += 1
        self.counts = counts
        self._begins = np.cumsum(counts) - counts
        self._source = np.repeat(np.arange(len(weights)), counts)

    def at(self, position: NDArray[np.int64], key: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and its place among all the positions of that source."""
        source, place = np.empty_like(position), np.empty_like(position)
        for block in np.unique(position // self.BLOCK):
            here = position // self.BLOCK == block
            slot = permuted(position[here] % self.BLOCK, self.BLOCK, (*key, int(block)))
            source[here] = self._source[slot]
            place[here] = block * self.counts[source[here]] + slot - self._begins[source[here]]
        return source, place
