"""The orders of an epoch, as they are specified, and data that show in which order they were read."""

from __future__ import annotations

import numpy as np

from fastvae.data import DataLoader

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK64
    return z ^ (z >> 31)


def key_of(seed: int, epoch: int) -> int:
    return mix((mix((seed + GOLDEN) & MASK64) + epoch) & MASK64)


def round_function(half: int, key: int) -> int:
    h = (half ^ key) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ (h >> 16)


def permuted(n: int, key: int) -> list[int]:
    """The permutation of a key."""
    bits = max(6, (n - 1).bit_length())
    high_bits, low_bits = bits // 2, bits - bits // 2
    keys = [mix((key + (r + 1) * GOLDEN) & MASK64) >> 32 for r in range(8)]

    def once(value: int) -> int:
        low, high = value & ((1 << low_bits) - 1), value >> low_bits
        for r in range(0, 8, 2):
            low ^= round_function(high, keys[r]) & ((1 << low_bits) - 1)
            high ^= round_function(low, keys[r + 1]) & ((1 << high_bits) - 1)
        return high << low_bits | low

    order = []
    for position in range(n):
        value = once(position) if n > 1 else position
        while value >= n:
            value = once(value)
        order.append(value)
    return order


def feistel_order(n: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order."""
    return permuted(n, key_of(seed, epoch))


def block_order(n: int, seed: int, epoch: int, block: int, per_window: int) -> list[int]:
    """The order shuffled in windows of blocks of consecutive samples."""
    blocks = -(-n // block)
    windows = -(-blocks // per_window)
    if windows < 2:
        return feistel_order(n, seed, epoch)
    key = key_of(seed, epoch)
    start = mix(key ^ 3) % n
    places = [*permuted(n // block, mix(key ^ 1)), *([blocks - 1] if n % block else [])]
    order: list[int] = []
    begin = 0
    for window in range(windows):
        count = blocks // windows + (window < blocks % windows)
        samples = [
            (place * block + i + start) % n
            for place in places[begin : begin + count]
            for i in range(min(block, n - place * block))
        ]
        window_key = (mix(key ^ 2) + window * GOLDEN) & MASK64
        order += [samples[i] for i in permuted(len(samples), window_key)]
        begin += count
    return order


def rows_of(loader: DataLoader) -> np.ndarray:
    """The rows that one pass delivers, read off data whose value is the row."""
    return np.concatenate([batch.numpy()[:, 0] for batch in loader]).astype(np.int64)


def numbered(n: int, width: int = 3) -> np.ndarray:
    return np.arange(n, dtype=np.float32)[:, None].repeat(width, axis=1)
