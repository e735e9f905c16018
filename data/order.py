"""The order of an epoch: a permutation of the windows that is computed, never stored.

A Feistel network (Luby and Rackoff 1988) is a bijection whatever its round function is; walking along its cycles until
the value is below n (Black and Rogaway 2002) makes it one of any n numbers. So a shuffle of 10 billion windows takes no
memory, any position in it is reached at once, and it depends on (n, seed, epoch) only: not on NumPy's generators,
whose streams may change between releases.
"""

import hashlib

import numpy as np

_ROUNDS = 8
_MIN_HALF_BITS = 3  # below 64 values there are too few round functions: some orders would come more often


def permute(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the permutation of 0..n-1 that belongs to (seed, epoch) takes `indices`, int64 (k,). 1 <= n < 2**62."""
    assert 1 <= n < 1 << 62, n
    half_bits = max(_MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(np.asarray(indices).astype(np.uint64), half_bits, keys)
    while (outside := values >= n).any():  # the network's domain is below 4n (64 at least): a few turns
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"window order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of 0..4**half_bits - 1. Every round swaps the halves and stirs one with a hash of the other."""
    low = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & low
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & low)
    return (left << np.uint64(half_bits)) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit in changes half of the bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
