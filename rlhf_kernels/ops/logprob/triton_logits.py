"""Triton kernels of `logprob` over logits that are already there: one read forward, one read and write backward.

Forward is one program a row, online over tiles. What is summed is relative to the top token so far and leaves it out:
each thread keeps, of its columns, R = sum e^(z - top), U = sum e^(z - top) (z - top) and C, how many equal the top.
When a later token exceeds the top by g, the old top's tokens enter the sums: R becomes e^-g (R + C) and U becomes
e^-g (U - g (R + C)). One reduction a tile (its maximum), all else once at the end. The contract is that of
csrc/cpu/logprob_rows.cpp.
"""

import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_block import clamp
from rlhf_kernels.ops.logprob.triton_launch import block_of, device_of, warps_of
from rlhf_kernels.ops.logprob.triton_math import FLOOR, LOWEST, exp, log1p_wide
from rlhf_kernels.ops.shipped import Shipped

FORWARD, BACKWARD = (2048, 8), (2048, 16)  # columns of a tile, and how many of them a thread takes


@triton.jit
def _widened(ptr, keep, temperature):
    z = tl.load(ptr, mask=keep, other=0.0).to(tl.float32)
    if temperature != 1.0:
        z = tl.div_rn(z, temperature)
    return tl.where(keep, clamp(z), -float("inf"))


@triton.jit
def forward_kernel(
    logits_ptr, target_ptr, temperature_ptr, out_ptr, n, stride, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    out = out_ptr + row
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        for k in tl.static_range(5):
            tl.store(out + k * rows, 0.0)
    else:
        temperature = tl.load(temperature_ptr + row)
        base = logits_ptr + row * stride
        top = tl.full((), LOWEST, tl.float32)
        r = tl.zeros((BLOCK,), tl.float32)
        u = tl.zeros((BLOCK,), tl.float32)
        count = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _widened(base + columns, columns < n, temperature)
            before = top
            top = tl.maximum(before, tl.max(z, 0))
            g = top - before
            down = exp(-g)
            entered = r + tl.where(g > 0.0, count, 0.0)
            count = tl.where(g > 0.0, 0.0, count) + tl.where(z == top, 1.0, 0.0)
            x = z - top
            x = tl.where(x < FLOOR, FLOOR, x)
            e = tl.where(z == top, 0.0, exp(x))
            u = down * (u - g * entered) + e * x
            r = down * entered + e
        m = top.to(tl.float64)
        mass = tl.sum(r, 0).to(tl.float64) + (tl.sum(count, 0).to(tl.float64) - 1.0)  # without one top token
        weighted = tl.sum(u, 0).to(tl.float64)
        here = (target >= 0) & (target < n)
        at = _widened(base + tl.where(here, target, 0), here, temperature)
        is_top = at == top
        at = at.to(tl.float64)
        s = 1.0 + mass
        growth = log1p_wide(mass)
        gap = tl.where(at - m < FLOOR, FLOOR, at - m)
        alone = tl.where(mass == 0, LOWEST, m + tl.log(mass))
        rest = tl.where(is_top, alone, m + tl.log(s - tl.exp(gap)))  # the subtraction loses at most one bit
        empty = (top == LOWEST) & (mass == mass)  # every token masked
        lse = tl.where(empty, LOWEST, m + growth)
        entropy = tl.where(empty, 0.0, growth - weighted / s)
        rest = tl.where(here, tl.where(empty, LOWEST, rest), lse)
        odds = rest - at  # logprob = -log(1 + e^odds)
        small = tl.exp(-tl.abs(odds))
        logprob = -log1p_wide(small) - tl.where(odds > 0, odds, 0.0)
        miss = tl.where(odds > 0, 1.0, small) / (1.0 + small)
        logprob = tl.where(here, logprob, float("nan"))  # a target outside the vocabulary
        miss = tl.where(here, miss, float("nan"))
        rounded = lse.to(tl.float32)
        tl.store(out, logprob.to(tl.float32))
        tl.store(out + rows, rounded)
        tl.store(out + 2 * rows, entropy.to(tl.float32))
        tl.store(out + 3 * rows, miss.to(tl.float32))
        tl.store(out + 4 * rows, (lse - rounded.to(tl.float64)).to(tl.float32))


@triton.jit
def backward_kernel(
    logits_ptr, target_ptr, temperature_ptr, coefficients_ptr, out_ptr, n, stride, out_stride, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = columns < n
    target = tl.load(target_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    c = coefficients_ptr + row
    z = _widened(logits_ptr + row * stride + columns, keep, temperature)
    log_p = (z - tl.load(c)) - tl.load(c + rows)
    log_p = tl.where(log_p < FLOOR, FLOOR, log_p)
    inner = tl.load(c + 2 * rows) + tl.load(c + 3 * rows) * log_p
    is_target = columns == target
    inner = tl.where(is_target, inner + tl.load(c + 4 * rows), inner)  # logprob's share is added exactly: g (1 - p)
    p = exp(log_p)
    dz = tl.where(is_target, tl.load(c + 5 * rows), 0.0) + p * inner
    dz = tl.where((target < 0) | (target >= n), float("nan"), dz)
    dz = tl.where(target == ignore_index, 0.0, dz * tl.div_rn(1.0, temperature))
    tl.store(out_ptr + row * out_stride + columns, dz.to(out_ptr.dtype.element_ty), mask=keep)


def logprob_rows(logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, out: Tensor) -> None:
    """out fp32 [5, N]: logprob, lse, entropy, 1 - p_target, and what lse lost by rounding, of logits [N, V]."""
    rows, n = logits.shape
    if rows == 0:
        return
    block = block_of(n, FORWARD[0])
    with device_of(logits):
        forward_kernel[(rows,)](
            logits, target, temperature, out, n, logits.stride(0), ignore_index, BLOCK=block,
            num_warps=warps_of(block, FORWARD[1]),
        )  # fmt: skip


def logprob_rows_backward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, coefficients: Tensor, out: Tensor
) -> None:
    """The gradient of logits [N, V] into out, which may be their own storage; coefficients [6, N] as in csrc."""
    rows, n = logits.shape
    if rows == 0:
        return
    block = block_of(n, BACKWARD[0])
    with device_of(logits):
        backward_kernel[(rows, triton.cdiv(n, block))](
            logits, target, temperature, coefficients, out, n, logits.stride(0), out.stride(0), ignore_index,
            BLOCK=block, num_warps=warps_of(block, BACKWARD[1]),
        )  # fmt: skip


def shipped(arch: str) -> list[Shipped]:
    """Both kernels on full tiles, for each dtype of logits."""
    found = []
    for kernel, named, (block, values) in (
        (forward_kernel, "logprob forward", FORWARD),
        (backward_kernel, "logprob backward", BACKWARD),
    ):
        for dtype in ("fp32", "bf16", "fp16"):
            types = {"logits_ptr": f"*{dtype}", "out_ptr": "*fp32" if kernel is forward_kernel else f"*{dtype}"}
            types.update(target_ptr="*i64", temperature_ptr="*fp32", coefficients_ptr="*fp32")
            signature = {name: types.get(name, "i32") for name in kernel.arg_names if name != "BLOCK"}
            found.append(
                Shipped(
                    name=f"{named} ({dtype}, {block})",
                    kernel=kernel,
                    signature=signature,
                    constexprs={"BLOCK": block},
                    num_warps=warps_of(block, values),
                    divisible=tuple(name for name in signature if name != "ignore_index"),
                )
            )
    return found
