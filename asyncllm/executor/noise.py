"""Sampling noise by counter: a hash of (seed, position, token id), no generator and no state.

The noise of a token does not depend on the batch, the order of rows, the slot, the device or on how many candidates
top-k left over; so a recomputed, preempted or overshot step draws what it drew before. Engine thread only.

    key(seed, position) = splitmix64 seeded with mix64(seed), output number `position`           64 bits, on the host
    bits(key, token)    = two murmur3-style rounds over (token_hash[token] ^ key_low) * (key_high | 1)    32 bits
    E = -log1p(w),  w = (bits with the sign bit set) * 2**-31 in (-1, 0)                 exponential, mean 1
    argmax over tokens of  z - log(E)       =       Gumbel-max, a draw from softmax(z)

The exponential that wins a race is close to 0. Drawing it as -log1p(-v) keeps all of float32's precision where v is
small (31 bits: noise reaches up to 21.5), while -log(u) with u close to 1 would stop at 24 bits and favour nothing
beyond 16.6.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment, 2**64 / golden ratio
_SIGN = -(2**31)
# 2**31 times this is 1 - 2**-24, the largest float32 below 1: log1p(-1) = -inf can then never come up.
_TO_MINUS_UNIT = (1 - 2.0**-24) * 2.0**-31
# Rows are scored in groups of this many elements, which bounds scratch memory at about 5 x 16 MiB.
_MAX_ELEMENTS = 1 << 22


def _mix64(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014), a bijection."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def row_keys(seeds: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Tensor:
    """Noise keys of rows, [R, 2] int32 on the host: a word to xor and an odd word to multiply with.

    seeds, positions: [R] int64; `position` is the index in its sequence of the token about to be sampled.
    """
    state = _mix64(seeds.view(np.uint64)) + positions.view(np.uint64) * GOLDEN
    words = _mix64(state).view(np.int32).reshape(-1, 2)
    words[:, 1] |= 1
    return torch.from_numpy(words)


def token_hashes(vocab_size: int) -> Tensor:
    """The table `token_hash`, [V] int32 on the host.

    Neighbouring token ids would meet a row's key almost equal; hashing them once here costs no step anything.
    """
    mixed = _mix64(np.arange(1, vocab_size + 1, dtype=np.uint64) * GOLDEN)
    return torch.from_numpy(mixed.astype(np.uint32).view(np.int32))


class CounterNoise:
    """Draws from softmax(z) by Gumbel-max, with the hash above for noise."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._token_hash = token_hashes(vocab_size).to(device)

    def race(self, z: Tensor, keys: Tensor) -> Tensor:
        """Scores z + Gumbel noise over the whole vocabulary, in place: the row's argmax is the draw.

        z [R, V] float32; keys [R, 2] int32 on z's device.
        """
        rows = max(1, _MAX_ELEMENTS // z.shape[1])
        for part, part_keys in zip(z.split(rows), keys.split(rows)):
            part.sub_(_log_exponential(self._token_hash, part_keys))
        return z

    def race_among(self, z: Tensor, token_ids: Tensor, keys: Tensor) -> Tensor:
        """The same scores for candidates only: z and token_ids [R, C], a new tensor."""
        return z - _log_exponential(self._token_hash[token_ids], keys)


def _log_exponential(token_hash: Tensor, keys: Tensor) -> Tensor:
    """Gumbel noise with its sign turned, log(E). token_hash [V] or [R, C]; keys [R, 2]; returns [R, V] or [R, C]."""
    bits = (token_hash ^ keys[:, :1]).mul_(keys[:, 1:])
    # Right shifts of int32 copy the sign; the masks make them the logical shifts that keep each round a bijection.
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    bits *= -0x7A143595  # 0x85EBCA6B as int32
    bits ^= (bits >> 13).bitwise_and_(0x7FFFF)
    bits *= -0x3D4D51CB  # 0xC2B2AE35
    w = bits.bitwise_or_(_SIGN).to(torch.float32).mul_(_TO_MINUS_UNIT)
    return w.log1p_().neg_().log_()
