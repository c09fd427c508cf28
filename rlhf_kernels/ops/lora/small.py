"""`lora_linear` of few rows on CUDA, as in decoding: the library's base products, then one launch for all adapters.

The launch (csrc/cuda/lora_small_m.cuh) reads each row's adapter on the device and adds to y in place, so a captured
CUDA graph follows an index that is overwritten. Its backward is the library's: S has one layout.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora.library import backward, widths

__all__ = ["backward", "forward", "serves"]

MOST_ROWS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ops = torch.ops.rlhf_kernels


def serves(x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool) -> bool:
    if backward or not x.is_cuda or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return False  # traced rows are no number: the op asks again when it runs
    return x.shape[0] <= MOST_ROWS and _built()


@cache
def _built() -> bool:
    return "cuda" in registry.native_devices("lora_small_m")


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    saved_rows: int,
) -> tuple[list[Tensor], Tensor | None]:
    """See `tier.Tier`."""
    ys = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases)]
    s = x.new_zeros(saved_rows, sum(widths(lora_a, len(weights)))) if saved_rows else None
    if index is not None and index.dtype not in (torch.int32, torch.int64):
        index = index.int()
    index = index.contiguous() if index is not None and runs is None else None
    x = x if x.stride(-1) == 1 else x.contiguous()
    a, b = _as_one_dtype([*lora_a, *lora_b], x.dtype)
    ops.lora_small_m(x, a, b, index, list(runs or ()), list(scaling), scaling_tensor, ys, s)
    return ys, s


def _as_one_dtype(adapters: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """A and B as the launch reads them: all of x's dtype, or all fp32; copied only where they are not."""
    found = {t.dtype for t in adapters}
    if len(found) > 1 or not found <= {dtype, torch.float32}:
        adapters = [t.to(dtype) for t in adapters]
    adapters = [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in adapters]
    return adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :]
