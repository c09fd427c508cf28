"""Triton kernels of `masked_whiten`: two launches for the moments, one to apply them.

A program takes a run of blocks and joins each block's count, mean and squared deviations, both exact passes over
registers in fp64, to those before it by Chan's formula; one program joins the runs. The order is fixed by the size
alone, so a result never varies; no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_launch import device_of
from rlhf_kernels.ops.shipped import Shipped

BLOCK, WARPS = 2048, 8
MOST_RUNS = 512


@triton.jit
def moments_kernel(x_ptr, mask_ptr, runs_ptr, n, blocks, BLOCK: tl.constexpr):
    run = tl.program_id(0)
    runs = tl.num_programs(0)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    first = run.to(tl.int64) * blocks * BLOCK
    for block in range(0, blocks):
        at = first + block * BLOCK + tl.arange(0, BLOCK)
        there = tl.load(mask_ptr + at, mask=at < n, other=0) != 0
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float64)
        own_count = tl.sum(there.to(tl.int32), 0).to(tl.float64)
        own_mean = tl.sum(x, 0) / tl.maximum(own_count, 1.0)
        own = tl.where(there, x - own_mean, 0.0)
        both = count + own_count
        share = own_count / tl.maximum(both, 1.0)
        gap = own_mean - mean
        squares += tl.sum(own * own, 0) + gap * gap * count * share
        mean += gap * share
        count = both
    tl.store(runs_ptr + run, count)
    tl.store(runs_ptr + runs + run, mean)
    tl.store(runs_ptr + 2 * runs + run, squares)


@triton.jit
def join_kernel(runs_ptr, out_ptr, runs, RUNS: tl.constexpr):
    at = tl.arange(0, RUNS)
    there = at < runs
    counts = tl.load(runs_ptr + at, mask=there, other=0.0)
    means = tl.load(runs_ptr + runs + at, mask=there, other=0.0)
    squares = tl.load(runs_ptr + 2 * runs + at, mask=there, other=0.0)
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.maximum(count, 1.0)
    gaps = tl.where(counts > 0.0, means - mean, 0.0)
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, mean)
    tl.store(out_ptr + 2, tl.sum(squares + counts * gaps * gaps, 0))


@triton.jit
def whiten_kernel(x_ptr, mask_ptr, moments_ptr, out_ptr, n, epsilon, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = tl.load(mask_ptr + at, mask=at < n, other=0) != 0
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float64)
    mean = tl.load(moments_ptr + 1)
    variance = tl.load(moments_ptr + 2) / tl.maximum(tl.load(moments_ptr), 1.0)
    out = (x - mean) * (1.0 / tl.sqrt(variance + epsilon))
    if not SHIFT:
        out += mean
    tl.store(out_ptr + at, tl.where(there, out, 0.0).to(out_ptr.dtype.element_ty), mask=at < n)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """fp64 [3] of any float x and a bool mask of its shape: count, mean and squared deviations of the valid entries."""
    x, mask = x.contiguous(), mask.contiguous().view(torch.uint8)
    out = x.new_empty(3, dtype=torch.float64)
    whole = max(1, triton.cdiv(x.numel(), BLOCK))
    blocks = triton.cdiv(whole, MOST_RUNS)
    runs = triton.cdiv(whole, blocks)
    parts = x.new_empty(3, runs, dtype=torch.float64)
    with device_of(x):
        moments_kernel[(runs,)](x, mask, parts, x.numel(), blocks, BLOCK=BLOCK, num_warps=WARPS)
        join_kernel[(1,)](parts, out, runs, RUNS=MOST_RUNS, num_warps=4)
    return out


def whiten(x: Tensor, mask: Tensor, moments: Tensor, epsilon: float, shift_mean: bool) -> Tensor:
    """x whitened by the moments, masked entries 0: fp64 of fp64, else fp32."""
    out = torch.empty(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    x, mask = x.contiguous(), mask.contiguous().view(torch.uint8)
    if x.numel() > 0:
        with device_of(x):
            whiten_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, mask, moments.contiguous(), out, x.numel(), epsilon, SHIFT=shift_mean, BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip
    return out


def shipped(arch: str) -> list[Shipped]:
    """The three kernels; those that read x, of fp32 and of bf16."""
    found = [_shipped("whiten join", join_kernel, {"RUNS": MOST_RUNS}, {}, warps=4)]
    for dtype, shift in (("fp32", True), ("bf16", False)):
        own = {"x_ptr": f"*{dtype}", "out_ptr": "*fp32"}
        name = f"whiten ({dtype}{'' if shift else ', mean kept'})"
        found.append(_shipped(f"whiten moments ({dtype})", moments_kernel, {"BLOCK": BLOCK}, own, WARPS))
        found.append(_shipped(name, whiten_kernel, {"SHIFT": shift, "BLOCK": BLOCK}, own, WARPS))
    return found


def _shipped(name: str, kernel: Any, constants: dict[str, Any], own: dict[str, str], warps: int) -> Shipped:
    types = {"mask_ptr": "*u8", "epsilon": "fp32", "n": "i32", "blocks": "i32", "runs": "i32"}
    signature = {n: own.get(n, types.get(n, "*fp64")) for n in kernel.arg_names if n not in constants}
    pointers = tuple(n for n in signature if n.endswith("_ptr"))
    return Shipped(name, kernel, signature, constants, num_warps=warps, divisible=pointers)
