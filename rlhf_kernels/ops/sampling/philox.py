"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), exact in int64 tensors.

A row's draw: key = (seed low, seed high), counter = (position, sample_index, stream low, stream high), 32 bits each.
The draw's 53 bits are the top bits of (output[1] << 32 | output[0]). csrc/cpu/sampling.cpp has the same layout.
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four 32-bit outputs (in int64 tensors) for a counter of four and a key of two 32-bit words (in int64 tensors)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, so their bits are those of the unsigned product
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & LOW_32) ^ c1 ^ k0,
            p1 & LOW_32,
            (p0 >> 32 & LOW_32) ^ c3 ^ k1,
            p0 & LOW_32,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return c0, c1, c2, c3


def uniform(seed: Tensor, stream: Tensor, sample_index: Tensor, position: Tensor) -> Tensor:
    """One float64 in [0, 1), a multiple of 2^-53, for each row of the int64 tensors."""
    counter = (position & LOW_32, sample_index & LOW_32, stream & LOW_32, stream >> 32 & LOW_32)
    out = philox4x32(counter, (seed & LOW_32, seed >> 32 & LOW_32))
    bits = (out[1] << 21) | (out[0] >> 11)
    return bits.to(torch.float64) * 2.0**-53
