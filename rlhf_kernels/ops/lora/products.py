"""The GEMMs of the portable tier. On the CPU fp16 goes through fp32, a block of columns at a time.

PyTorch's fp16 GEMMs there are 3 to 300 times slower than that (dy @ W most of all), from four rows on.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

COLUMNS = 256  # of the right-hand side in fp32 at a time: 2 MiB at 2048 features, which stays in a cache
DIRECT_ROWS = 3  # up to which F.linear in fp16 is as fast


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias."""
    if not _through_single(x) or x.shape[0] <= DIRECT_ROWS:
        return F.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    _product(x, weight.t(), bias, y)
    return y


def mm(a: Tensor, b: Tensor) -> Tensor:
    if not _through_single(a):
        return torch.mm(a, b)
    return mm_into(a.new_empty(a.shape[0], b.shape[1]), a, b)


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out = a b."""
    if not _through_single(a):
        return torch.mm(a, b, out=out)
    _product(a, b, None, out)
    return out


def addmm_(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """y += scale a b."""
    if not _through_single(a):
        return y.addmm_(a, b, alpha=scale)
    _product(a, b, y, y, scale)
    return y


def _through_single(a: Tensor) -> bool:
    return a.dtype == torch.float16 and a.device.type == "cpu"


def _product(a: Tensor, b: Tensor, start: Tensor | None, out: Tensor, scale: float = 1.0) -> None:
    """out = start + scale a b in fp32, rounded once; start: None, a row, or `out` itself."""
    a = a.float()
    for first in range(0, b.shape[1], COLUMNS):
        columns = slice(first, first + COLUMNS)
        block = b[:, columns].float()
        if start is None:
            out[:, columns] = torch.mm(a, block)
        else:
            out[:, columns] = torch.addmm(start[..., columns].float(), a, block, alpha=scale)
