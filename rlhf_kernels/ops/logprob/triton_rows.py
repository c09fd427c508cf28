"""Triton row passes over one vocabulary block of fp32 logits; contract of `rows.py` and csrc/cpu/logprob.cpp.

One program a row: the row is read once into registers and written at most once. Where the transformation changes
nothing (no bias, softcap, scale or temperature), and where nobody reads it afterwards (`head_js`, and `zr` in
`head_grad`), it is not written back. On the CPU the kernels run in Triton's interpreter only.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob.triton_block import load, mass, ratio, target_column, uncapped
from rlhf_kernels.ops.logprob.triton_launch import block_of, device_of, warps_of
from rlhf_kernels.ops.logprob.triton_math import FLOOR, LOWEST, exp, expm1, log_cosh_plus
from rlhf_kernels.ops.shipped import Shipped

# of each kernel: most columns of a program, and how many of them a thread takes (see triton_launch.warps_of)
STATS, EXP, JS, GRAD = (4096, 8), (8192, 16), (2048, 4), (2048, 8)


@triton.jit
def stats_kernel(
    z_ptr, zr_ptr, target_ptr, bias_ptr, temperature_ptr, state_ptr, n, stride, softcap, scale,
    RAW: tl.constexpr, SHAPED: tl.constexpr, CAPPED: tl.constexpr, KL: tl.constexpr, RKL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    keep = columns < n
    temperature = tl.load(temperature_ptr + row)
    target = target_column(target_ptr, row, n)
    changed = temperature != 1.0
    if SHAPED:
        changed = temperature == temperature
    z = load(z_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
    if RAW:  # noqa: SIM102 - a constant, and a value
        if changed:
            tl.store(z_ptr + row * stride + columns, z, mask=keep)
    top, pivot, e, r, lse, rest, at, entropy = mass(z, columns, target)
    out = state_ptr + row
    tl.store(out, lse)
    tl.store(out + rows, rest)
    tl.store(out + 2 * rows, at)
    tl.store(out + 3 * rows, entropy)
    if zr_ptr is not None:
        zr = load(zr_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
        if RAW:  # noqa: SIM102
            if changed:
                tl.store(zr_ptr + row * stride + columns, zr, mask=keep)
        ref_top, ref_pivot, ref_e, ref_r, ref_lse, ref_rest, ref_at, _ = mass(zr, columns, target)
        tl.store(out + 4 * rows, ref_lse)
        tl.store(out + 5 * rows, ref_rest)
        tl.store(out + 6 * rows, ref_at)
        difference = ref_lse - lse
        if RKL:
            back, rkl = ratio(zr, z, columns, ref_top, ref_pivot, ref_e, ref_r, ref_lse, top, lse)
            tl.store(out + 9 * rows, rkl)
            difference = -back
        if KL:
            difference, kl = ratio(z, zr, columns, top, pivot, e, r, lse, ref_top, ref_lse)
            tl.store(out + 8 * rows, kl)
        tl.store(out + 7 * rows, difference)


@triton.jit
def exp_kernel(
    z_ptr, target_ptr, bias_ptr, temperature_ptr, shift_ptr, mass_ptr, factor_ptr, target_z_ptr, n, stride, softcap,
    scale, RAW: tl.constexpr, CAPPED: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ptr + row)
    target = target_column(target_ptr, row, n)
    z = load(z_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
    is_target = columns == target
    at = tl.sum(tl.where(is_target, z, 0.0), 0).to(tl.float64)
    tl.store(target_z_ptr + row, at, mask=target >= 0)
    z = tl.where(is_target, LOWEST, z)
    top = tl.max(z, 0)
    total = tl.load(mass_ptr + row)
    if FIRST:
        shift = top
        tl.store(factor_ptr + row, 1.0)
    else:
        before = tl.load(shift_ptr + row)
        grown = top - before > 60.0
        gap = tl.where(before - top < FLOOR, FLOOR, before - top)
        factor = tl.where(grown, exp(gap), 1.0)
        shift = tl.where(grown, top, before)
        total *= factor.to(tl.float64)
        tl.store(factor_ptr + row, factor)
    e = tl.where(is_target | (columns >= n), 0.0, exp(z - shift))
    tl.store(shift_ptr + row, shift)
    tl.store(mass_ptr + row, total + tl.sum(e, 0).to(tl.float64))
    if CAPPED:
        e = tl.where(is_target, 0.0, e * uncapped(z, temperature, softcap))
    tl.store(z_ptr + row * stride + columns, e, mask=columns < n)


@triton.jit
def js_kernel(
    z_ptr, zr_ptr, bias_ptr, temperature_ptr, lse_ptr, ratio_ptr, sums_ptr, n, stride, softcap, scale,
    RAW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    lse = tl.load(lse_ptr + row)
    lse_low = tl.load(lse_ptr + rows + row)
    ratio = tl.load(ratio_ptr + row)
    wide = lse.to(tl.float64) + lse_low.to(tl.float64) + ratio.to(tl.float64)
    ref_lse = wide.to(tl.float32)
    ref_low = (wide - ref_lse.to(tl.float64)).to(tl.float32)
    js = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load(z_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
        zr = load(zr_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
        log_p = (z - lse) - lse_low
        t = (zr - z) - ratio
        h = 0.5 * t
        x = h * h
        p = exp(log_p)
        q = exp((zr - ref_lse) - ref_low)  # p e^t would round twice where |t| is large
        g = x * -8.28145785e-5 + 3.60898125e-4  # h sinh h - cosh h log cosh h, over h^2: nothing cancels
        g = g * x - 1.38821174e-3
        g = g * x + 6.94440522e-3
        g = g * x + 8.3599e-10
        g = g * x + 0.5
        p_part = tl.where(p == 0.0, 0.0, p * -log_cosh_plus(h))  # a NaN is not 0
        q_part = tl.where(q == 0.0, 0.0, q * -log_cosh_plus(-h))
        js += tl.where(tl.abs(h) < 0.5, p * exp(h) * (x * g), 0.5 * (p_part + q_part))
        mean += p_part
    tl.store(sums_ptr + row, tl.load(sums_ptr + row) + tl.sum(js, 0).to(tl.float64))
    tl.store(sums_ptr + rows + row, tl.load(sums_ptr + rows + row) + tl.sum(mean, 0).to(tl.float64))


@triton.jit
def grad_kernel(
    z_ptr, zr_ptr, target_ptr, bias_ptr, temperature_ptr, coefficients_ptr, n, stride, softcap, scale,
    RAW: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ptr + row)
    is_target = columns == target_column(target_ptr, row, n)
    z = load(z_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
    c = coefficients_ptr + row
    log_p = (z - tl.load(c)) - tl.load(c + rows)
    bounded = tl.where(log_p < FLOOR, FLOOR, log_p)
    p = exp(bounded)
    inner = tl.load(c + 3 * rows) + tl.load(c + 4 * rows) * bounded
    inner = tl.where(is_target, inner + tl.load(c + 8 * rows), inner)  # logprob's share is added exactly, as `miss`
    miss = tl.where(is_target, tl.load(c + 9 * rows), 0.0)
    if zr_ptr is not None:
        zr = load(zr_ptr + row * stride, columns, n, bias_ptr, temperature, softcap, scale, RAW, CAPPED)
        t = (zr - z) - tl.load(c + 2 * rows)
        less = tl.where(tl.abs(t) < 1.0, -p * expm1(t), p - exp(log_p + t))  # p - q
        mean = -log_cosh_plus(0.5 * t)  # log p - log((p + q) / 2)
        inner = inner - tl.load(c + 5 * rows) * t + tl.load(c + 7 * rows) * mean
        miss += tl.load(c + 6 * rows) * less
    slope = tl.div_rn(scale, temperature)
    dz = (tl.where(p == 0.0, 0.0, p * inner) + miss) * slope
    if CAPPED:
        dz = dz * uncapped(z, temperature, softcap)
    tl.store(z_ptr + row * stride + columns, dz, mask=columns < n)


def _launch(
    kernel: Any, size: tuple[int, int], z: Tensor, *tensors: Tensor | None, softcap: float, scale: float, **flags: bool
) -> None:
    """One program a row; for head_grad, whose columns are independent, one a tile of columns in it."""
    rows, n = z.shape
    if rows == 0 or n == 0:
        return
    block = block_of(n, size[0])
    grid = (rows, triton.cdiv(n, block)) if kernel is grad_kernel else (rows,)
    with device_of(z):
        kernel[grid](
            z, *tensors, n, z.stride(0), softcap, scale, CAPPED=softcap > 0, BLOCK=block,
            num_warps=warps_of(block, size[1]), **flags,
        )  # fmt: skip


def head_stats(
    z: Tensor,
    zr: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    kl: bool,
    rkl: bool,
    state: Tensor,
) -> None:
    """Statistics of a block [rows, n] into state fp64 [10, rows]; z and zr become transformed logits.

    A block of more columns than a program holds is taken in parts, whose statistics merge.
    """
    most = STATS[0]
    if z.shape[1] > most:
        for start in range(0, z.shape[1], most):
            columns = slice(start, start + most)
            part = torch.empty_like(state) if start else state
            right = None if zr is None else zr[:, columns]
            b = None if bias is None else bias[columns]
            head_stats(z[:, columns], right, target - start, b, temperature, softcap, scale, raw, kl, rkl, part)
            if start:
                state.copy_(st.merge(state, part, zr is not None))
        return
    state.zero_()
    shaped = bias is not None or softcap > 0 or scale != 1  # else temperature alone may change z, a row at a time
    _launch(
        stats_kernel, STATS, z, zr, target, bias, temperature, state, softcap=softcap, scale=scale, RAW=raw,
        SHAPED=shaped, KL=kl, RKL=rkl,
    )  # fmt: skip


def head_exp(
    z: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    first: bool,
    shift: Tensor,
    mass: Tensor,
    factor: Tensor,
    target_z: Tensor,
) -> None:
    """z to e^(z - shift) without the target, times the softcap's derivative; shift, mass, factor as in csrc."""
    if z.shape[1] > EXP[0]:
        raise ValueError(f"a block has {z.shape[1]} columns; head_exp takes at most {EXP[0]}")
    _launch(
        exp_kernel, EXP, z, target, bias, temperature, shift, mass, factor, target_z, softcap=softcap, scale=scale,
        RAW=raw, FIRST=first,
    )  # fmt: skip


def head_js(
    z: Tensor,
    zr: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    lse: Tensor,
    ratio: Tensor,
    sums: Tensor,
) -> None:
    """Adds a block's shares of JS and of KL(p || (p + q) / 2) to sums fp64 [2, rows]; z and zr stay as they are."""
    _launch(js_kernel, JS, z, zr, bias, temperature, lse, ratio, sums, softcap=softcap, scale=scale, RAW=raw)


def head_grad(
    z: Tensor,
    zr: Tensor | None,
    target: Tensor,
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    scale: float,
    raw: bool,
    coefficients: Tensor,
    scratch: Tensor | None,
) -> None:
    """z to the gradient of the raw logits; coefficients fp32 [10, rows] as in csrc; zr stays, scratch is not needed."""
    _launch(grad_kernel, GRAD, z, zr, target, bias, temperature, coefficients, softcap=softcap, scale=scale, RAW=raw)


def shipped(arch: str) -> list[Shipped]:
    """Every kernel with nothing special and with everything, on full blocks: 4,096 columns, and the widest."""
    sizes = [(stats_kernel, "head_stats", STATS), (exp_kernel, "head_exp", (4096, EXP[1]))]
    sizes += [(exp_kernel, "head_exp", EXP), (js_kernel, "head_js", JS), (grad_kernel, "head_grad", GRAD)]
    return [_shipped(*which, everything) for which in sizes for everything in (False, True)]


def _shipped(kernel: Any, named: str, size: tuple[int, int], everything: bool) -> Shipped:
    block, values = size
    constants: dict[str, Any] = {"BLOCK": block, "FIRST": False, "RAW": True}
    constants.update(dict.fromkeys(("SHAPED", "CAPPED", "KL", "RKL"), everything))
    if not everything:
        constants.update({"bias_ptr": None} | ({} if kernel is js_kernel else {"zr_ptr": None}))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"n": "i32", "stride": "i32", "softcap": "fp32", "scale": "fp32", "target_ptr": "*i64"}
    types.update(dict.fromkeys(("state_ptr", "mass_ptr", "target_z_ptr", "sums_ptr"), "*fp64"))
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
    return Shipped(
        name=f"{named} ({'every option' if everything else 'plain'}, {block})",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        num_warps=warps_of(block, values),
        divisible=tuple(name for name, kind in signature.items() if kind != "fp32"),
    )
