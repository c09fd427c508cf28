"""How the Triton row kernels are launched: columns a program holds, its warps, the device it runs on."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def block_of(n: int, most: int) -> int:
    """The power of 2, at least 128 (a warp group's threads), that holds n columns, or `most` if n is more."""
    return min(most, max(128, 1 << (n - 1).bit_length()))


def warps_of(block: int, values: int) -> int:
    """Warps of a program that gives each of a warp's 32 threads `values` of a block's columns, as far as that goes.

    More values a thread make fewer reductions between warps; too many spill. The counts at the kernels are the largest
    that spill on none of the shipped chips (an AMD warp has 64 threads: half as many values).
    """
    return max(4, min(16, block // (32 * values)))


def device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's GPU the current one: Triton launches there. Nothing on the CPU (the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
