"""Order and views as pure functions of (seed, epoch, index).

A counter-based hash (splitmix64) is used rather than a random generator: the value for one image depends on
nothing but its arguments, so neither library versions, nor the machine, nor the number of processes, nor the
other images of the subset can change it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt64Array = NDArray[np.uint64]

# One stream a purpose, so that e.g. an image's place in the order says nothing about its view.
STREAM_ORDER = 1
STREAM_VIEW = 2
STREAM_SUBSET = 3
STREAM_SPLIT = 4

_MASK = (1 << 64) - 1


def _splitmix64(x: UInt64Array) -> UInt64Array:
    """One output of splitmix64 (Steele, Lea, Flood 2014) from the state x; a bijection of 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_uniform_u64(stream: int, seed: int, epoch: int, index: NDArray[Any]) -> UInt64Array:
    """Uniform 64-bit numbers, one for each index.

    Args:
        stream: Small integer that separates purposes.
        seed: Any integer; taken modulo 2^64.
        epoch: Any integer; taken modulo 2^64.
        index: Integers [N].

    Returns:
        uint64 [N]: sm(sm(sm(sm(stream) ^ seed) ^ epoch) ^ index), where sm is splitmix64. Distinct indices
        give distinct numbers.
    """
    key = np.zeros(1, dtype=np.uint64)  # an array, since only arrays wrap around without a warning
    for part in (stream, seed, epoch):
        key = _splitmix64(key ^ np.uint64(int(part) & _MASK))
    return _splitmix64(key ^ np.asarray(index).astype(np.uint64))


def epoch_order(seed: int, epoch: int, index: Tensor) -> Tensor:
    """The order in which an epoch sees the images.

    Args:
        seed: The run's seed.
        epoch: 0, 1, ...
        index: int64 [N], positions in the whole training set.

    Returns:
        int64 [N], the same values in the order of their hashes. Two images keep their relative order when
        others are added or removed.
    """
    values = np.sort(index.cpu().numpy())
    order = np.argsort(hash_uniform_u64(STREAM_ORDER, seed, epoch, values), kind="stable")
    return torch.from_numpy(values[order])


def epoch_views(seed: int, epoch: int, index: Tensor, num_views: int) -> Tensor:
    """The view in which an epoch sees each image.

    Args:
        seed: The run's seed.
        epoch: 0, 1, ...
        index: int64 [N], positions in the whole training set.
        num_views: V, 1 .. 2^31.

    Returns:
        int64 [N], uniform in 0 .. V-1.
    """
    high = hash_uniform_u64(STREAM_VIEW, seed, epoch, index.cpu().numpy()) >> np.uint64(32)
    return torch.from_numpy(((high * np.uint64(num_views)) >> np.uint64(32)).astype(np.int64))
