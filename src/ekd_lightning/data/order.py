"""Order and views as pure functions of (seed, epoch, index).

A counter-based hash (splitmix64) replaces a random generator: the value of an image depends only on the arguments, not
on library versions, the machine, the number of processes or the other images of the subset.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# One stream per purpose, so that e.g. an image's position in the order and its view are independent.
STREAM_ORDER = 1
STREAM_VIEW = 2
STREAM_SUBSET = 3
STREAM_SPLIT = 4
STREAM_POOL = 5
STREAM_MIX = 6
STREAM_PARTNER = 8  # 7 is taken by training.trainer


def splitmix64(x: Tensor) -> Tensor:
    """Returns one output of splitmix64 (Steele, Lea, Flood 2014) per state, on the tensor's device; a bijection.

    The 64 bits of each int64 are taken as unsigned, since torch supports few operations in uint64.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _signed(bits: int) -> int:
    """Returns the low 64 bits as a signed integer."""
    bits &= (1 << 64) - 1
    return bits - (1 << 64) if bits >> 63 else bits


def _shift_right(x: Tensor, places: int) -> Tensor:
    return (x >> places) & ((1 << (64 - places)) - 1)  # the shift of an int64 would copy the sign


class Draws:
    """Random numbers for B views, each a pure function of (seed, place, call, view, index).

    With K = `hash_uniform_u64(STREAM_POOL, seed, place, 0)` and sm = splitmix64, call c draws from the bits
    b = sm(sm(sm(K ^ view) ^ index) ^ c); with a `count`, row j draws from sm(b ^ j). Nothing else has an influence:
    neither the rest of the batch, its size and order, nor the device.

    Args:
        seed: The pool's seed.
        place: Position of the augmentation in the list, counted from 0.
        view: int64 [B].
        index: int64 [B], positions in the whole training set, on the same device.
    """

    def __init__(self, seed: int, place: int, view: Tensor, index: Tensor) -> None:
        key = int(hash_uniform_u64(STREAM_POOL, seed, place, np.zeros(1, dtype=np.int64))[0])
        self._base = splitmix64(splitmix64(view ^ _signed(key)) ^ index)
        self._calls = 0

    def _bits(self, count: int | None) -> Tensor:
        bits = splitmix64(self._base ^ self._calls)
        self._calls += 1
        if count is None:
            return bits
        return splitmix64(bits ^ torch.arange(count, device=bits.device)[:, None])

    def uniform(self, low: float = 0.0, high: float = 1.0, count: int | None = None) -> Tensor:
        """Draws float32 [B], or [count, B], uniform in [low, high), in steps of 2^-24 of the range."""
        unit = _shift_right(self._bits(count), 40).float() * 2.0**-24
        return low + (high - low) * unit

    def integers(self, end: int | Tensor, count: int | None = None) -> Tensor:
        """Draws int64 [B], or [count, B], uniform in 0 .. end-1; `end` < 2^31 is one number for all, or int64 [B]."""
        return (_shift_right(self._bits(count), 32) * end) >> 32


def hash_uniform_u64(stream: int, seed: int, epoch: int, index: NDArray[Any]) -> NDArray[np.uint64]:
    """Hashes each index [N] to a uniform 64-bit number; different indices give different numbers.

    They are sm(sm(sm(sm(stream) ^ seed) ^ epoch) ^ index), where sm is splitmix64. The stream is one of the
    `STREAM_...` numbers, which separate purposes; seed and epoch are taken modulo 2^64.
    """
    key = torch.zeros((), dtype=torch.int64)
    for part in (stream, seed, epoch):
        key = splitmix64(key ^ _signed(int(part)))
    return splitmix64(key ^ torch.from_numpy(np.array(index, dtype=np.int64))).numpy().view(np.uint64)


def epoch_order(seed: int, epoch: int, index: Tensor) -> Tensor:
    """Returns the images int64 [N], positions in the whole training set, in the order of an epoch, counted from 0.

    It is the order of their hashes: the relative order of two images does not depend on the other images.
    """
    values = np.sort(index.cpu().numpy())
    order = np.argsort(hash_uniform_u64(STREAM_ORDER, seed, epoch, values), kind="stable")
    return torch.from_numpy(values[order])


def epoch_views(seed: int, epoch: int, index: Tensor, num_views: int) -> Tensor:
    """Returns the view of each image int64 [N] in an epoch, uniform in 0 .. V-1 with V in 1 .. 2^31."""
    high = hash_uniform_u64(STREAM_VIEW, seed, epoch, index.cpu().numpy()) >> np.uint64(32)
    return torch.from_numpy(((high * np.uint64(num_views)) >> np.uint64(32)).astype(np.int64))
