"""Triton kernels of `gae` and its gradient: a program a sequence, an associative scan over blocks of its tokens.

Forward, a stretch of tokens maps what comes after it, (A, V) of the next valid token, to A of its first valid one:
A' = a + g V + c A. Two neighbouring stretches join into one, so a block's tokens are scanned in a logarithm of steps;
a masked token is the identity. Backward, D_t = g_t + gamma lam D_{t-1} joins in the same way. Everything between the
loads and the stores is fp64, so a tree of sums errs less than the loop does in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob.triton_launch import device_of
from rlhf_kernels.ops.shipped import Shipped

BLOCK, WARPS = 1024, 8


@triton.jit
def _join_after(a1, g1, c1, v1, there1, a2, g2, c2, v2, there2):
    """A stretch (1) and the one before it (2): `there`: it has a valid token, the first of which has the value v."""
    a = a2 + c2 * a1 + tl.where(there1 != 0, g2 * v1, 0.0)
    g = tl.where(there1 != 0, c2 * g1, g2)
    return a, g, c2 * c1, tl.where(there2 != 0, v2, v1), there1 | there2


@triton.jit
def _join_before(c1, d1, less_c1, less_d1, c2, d2, less_c2, less_d2):
    """A stretch (1) and the one after it (2): D -> c D + d, and the same without the last token."""
    return c2 * c1, c2 * d1 + d2, less_c2 * c1, less_c2 * d1 + less_d2


@triton.jit
def _first(x, at):
    return tl.sum(tl.where(at, x, 0.0), 0)


@triton.jit
def gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, starts_ptr, last_ptr, advantages_ptr, returns_ptr, size,
    gamma_high, gamma_low, decay_high, decay_low, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    end = tl.load(starts_ptr + sequence + 1)
    gamma = tl.zeros((), tl.float64) + gamma_high + gamma_low
    decay = tl.zeros((), tl.float64) + decay_high + decay_low
    next_value = tl.load(last_ptr + sequence).to(tl.float64)
    running = tl.zeros((), tl.float64)
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(end - start, BLOCK)
    for done in range(0, blocks):
        at = start + (blocks - 1 - done) * BLOCK + lanes
        inside = (at < end) & (at >= 0) & (at < size)
        there = inside
        if mask_ptr is not None:
            there = there & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        reward = tl.load(rewards_ptr + at, mask=there, other=0.0).to(tl.float64)
        value = tl.load(values_ptr + at, mask=there, other=0.0).to(tl.float64)
        a = reward - value
        g = tl.where(there, gamma, 0.0)
        c = tl.where(there, decay, 1.0)
        a, g, c, v, some = tl.associative_scan((a, g, c, value, there.to(tl.int32)), 0, _join_after, reverse=True)
        a += tl.where(some != 0, g * next_value, 0.0) + c * running
        tl.store(advantages_ptr + at, tl.where(there, a, 0.0).to(advantages_ptr.dtype.element_ty), mask=inside)
        tl.store(returns_ptr + at, tl.where(there, a + value, 0.0).to(returns_ptr.dtype.element_ty), mask=inside)
        running = _first(a, lanes == 0)
        next_value = tl.where(tl.max(some, 0) != 0, _first(v, lanes == 0), next_value)


@triton.jit
def gae_backward_kernel(
    grad_ptr, mask_ptr, starts_ptr, rewards_ptr, values_ptr, last_ptr, size,
    gamma_high, gamma_low, decay_high, decay_low, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + sequence)
    end = tl.load(starts_ptr + sequence + 1)
    gamma = tl.zeros((), tl.float64) + gamma_high + gamma_low
    decay = tl.zeros((), tl.float64) + decay_high + decay_low
    running = tl.zeros((), tl.float64)
    lanes = tl.arange(0, BLOCK)
    kind = rewards_ptr.dtype.element_ty
    for block in range(0, tl.cdiv(end - start, BLOCK)):
        at = start + block * BLOCK + lanes
        inside = (at < end) & (at >= 0) & (at < size)
        there = inside
        if mask_ptr is not None:
            there = there & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        d = tl.load(grad_ptr + at, mask=there, other=0.0).to(tl.float64)
        c = tl.where(there, decay, 1.0)
        one = tl.full((BLOCK,), 1.0, tl.float64)
        c, d, less_c, less_d = tl.associative_scan((c, d, one, one * 0.0), 0, _join_before)
        before = less_c * running + less_d
        d += c * running
        tl.store(rewards_ptr + at, tl.where(there, d, 0.0).to(kind), mask=inside)
        tl.store(values_ptr + at, tl.where(there, gamma * before - d, 0.0).to(kind), mask=inside)
        running = _first(d, lanes == BLOCK - 1)
    tl.store(last_ptr + sequence, (gamma * running).to(kind))


def _two(factor: float) -> tuple[float, float]:
    """A number as a sum of two fp32: a launch takes no fp64."""
    high = float(torch.tensor(factor, dtype=torch.float32))
    return high, factor - high


def _launch(kernel: Any, *tensors: Tensor | None, starts: Tensor, gamma: float, lam: float) -> None:
    sequences, first = starts.shape[0] - 1, tensors[0]
    assert first is not None
    read = [x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x for x in tensors]
    if sequences > 0:
        with device_of(first):
            kernel[(sequences,)](
                *read, first.numel(), *_two(gamma), *_two(gamma * lam), BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    starts: Tensor,
    last_value: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `naive.gae`; all contiguous."""
    out = torch.empty_like(rewards), torch.empty_like(rewards)
    _launch(gae_kernel, rewards, values, mask, starts, last_value, *out, starts=starts, gamma=gamma, lam=lam)
    return out


def gae_backward(
    grad: Tensor, mask: Tensor | None, starts: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as `naive.gae_backward`; all contiguous."""
    rewards, values, last = torch.empty_like(grad), torch.empty_like(grad), grad.new_empty(starts.shape[0] - 1)
    _launch(gae_backward_kernel, grad, mask, starts, rewards, values, last, starts=starts, gamma=gamma, lam=lam)
    return rewards, values, last


def shipped(arch: str) -> list[Shipped]:
    """Both kernels in fp32 with and without a mask, and in fp64."""
    kernels = ((gae_kernel, "gae"), (gae_backward_kernel, "gae backward"))
    configurations = (("fp32", False), ("fp32", True), ("fp64", True))
    return [_shipped(*kernel, *configuration) for kernel in kernels for configuration in configurations]


def _shipped(kernel: Any, named: str, dtype: str, masked: bool) -> Shipped:
    constants = {"BLOCK": BLOCK} | ({} if masked else {"mask_ptr": None})
    types = {"mask_ptr": "*u8", "starts_ptr": "*i64", "size": "i32"}
    types |= {f"{name}_{part}": "fp32" for name in ("gamma", "decay") for part in ("high", "low")}
    signature = {n: types.get(n, f"*{dtype}") for n in kernel.arg_names if n not in constants}
    return Shipped(
        name=f"{named} ({dtype}{', mask' if masked else ''})",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        num_warps=WARPS,
        divisible=tuple(n for n in signature if n.endswith("_ptr")),
    )
