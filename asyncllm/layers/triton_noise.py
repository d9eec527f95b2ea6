"""Sampling noise by counter inside kernels: the definition is `executor/noise.py`.

The same integers, bit for bit; floats differ from it by a few times 1e-7. Pure functions; engine thread only.
"""

import triton
import triton.language as tl

from asyncllm.layers.sampling_columns import NUM_COLUMNS, SEED_HIGH, SEED_LOW

_NUM_COLUMNS, _SEED_LOW, _SEED_HIGH = tl.constexpr(NUM_COLUMNS), tl.constexpr(SEED_LOW), tl.constexpr(SEED_HIGH)


@triton.jit
def _mix64(state: tl.tensor) -> tl.tensor:
    """The output function of splitmix64, on uint64."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)


@triton.jit
def row_key(ints: tl.tensor, slot: tl.tensor, position: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """A word to xor and an odd word to multiply with, uint32: output number `position` of the seed's splitmix64."""
    low = tl.load(ints + slot * _NUM_COLUMNS + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(ints + slot * _NUM_COLUMNS + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    key = _mix64(_mix64((high << 32) | low) + position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32) | 1


@triton.jit
def noise_bits(token_hash: tl.tensor, key_low: tl.tensor, key_high: tl.tensor) -> tl.tensor:
    """32 hash bits of each token, uint32."""
    bits = (token_hash.to(tl.uint32, bitcast=True) ^ key_low) * key_high
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    return (bits ^ (bits >> 13)) * 0xC2B2AE35


@triton.jit
def _ln(x: tl.tensor) -> tl.tensor:
    """Natural logarithm of normal positive float32, precise to the last places also next to 1.

    16 plain instructions, where the library's takes 22 and a branch for zeros, infinities and denormals; the hardware's
    own approximation has an absolute error near 1, exactly where noise wants a relative one.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # such that the mantissa falls into [2/3, 4/3)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # Chebyshev fit of (ln(1 + f) - f) / f², relative error of the logarithm 8e-9.
    p = f * -0.12734152 + 0.13756539
    p = p * f - 0.12219618
    p = p * f + 0.14054218
    p = p * f - 0.16678093
    p = p * f + 0.20007323
    p = p * f - 0.24999839
    p = p * f + 0.33333272
    p = p * f - 0.5
    return exponent.to(tl.float32) * 8.262958405176314e-08 + (f * f * p + f)  # ln(2) / 2**23


@triton.jit
def log_exponential(bits: tl.tensor) -> tl.tensor:
    """Gumbel noise with its sign turned, log(-log1p(-v)) with v of 31 hash bits."""
    w = (bits | 0x80000000).to(tl.int32, bitcast=True).to(tl.float32)
    v = w * -4.656612595521636e-10  # (1 - 2**-24) / 2**31
    u = 1.0 - v
    # What 1 - v lost in rounding is given back; it matters where v is small, and there 1 / u needs no more than 1.
    return _ln((v - (1.0 - u)) - _ln(u))
