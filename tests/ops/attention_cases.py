"""Inputs of the attention ops and their definition in any dtype, for the tests of Triton's kernels."""

from itertools import accumulate

import torch

from rlhf_kernels.ops.attention import naive

F32, F16, F64 = torch.float32, torch.float16, torch.float64
NORM_BOUND = {F32: 1e-5, F16: 2e-3, torch.bfloat16: 1e-2}


def borders(lengths, device="cpu"):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def rows(tokens, heads, dim, dtype=F32, device="cpu", factor=1.0):
    """[tokens, heads, dim], strided as models hand it over: [1, heads, tokens, dim] in memory."""
    return (torch.randn(1, heads, tokens, dim) * factor).to(dtype).to(device)[0].transpose(0, 1)


def as_exact_as_plain(name, out, plain, exact, times):
    """At most `times` the plain formula's error in the same dtype, with the rounding of one addition as a floor."""
    assert out.shape == exact.shape, name
    assert out.isfinite().all(), name
    error, allowed = (out.double() - exact).abs(), (plain.double() - exact).abs().max()
    assert (error <= torch.maximum(times * allowed, 2e-7 * (1 + exact.abs()))).all(), (
        f"{name}: {error.max().item():.3g}, the plain formula's {allowed.item():.3g}"
    )
    assert error.norm() <= NORM_BOUND[out.dtype] * exact.norm() + 1e-12, name


class Sliced:
    """Sequences of `lengths` tokens in slices in random order, the last `new` of each as queries; NaN elsewhere."""

    def __init__(self, device, lengths, new, heads=4, kv_heads=2, d=32, dv=None, slice_tokens=16, dtype=F32,
                 factor=1.0, width=None):  # fmt: skip
        self.lengths, self.new, self.d = lengths, new, d
        dv = d if dv is None else dv
        self.q = rows(sum(new), heads, d, dtype, device, factor)
        self.k = [rows(n, kv_heads, d, dtype, device, factor) for n in lengths]
        self.v = [rows(n, kv_heads, dv, dtype, device) for n in lengths]
        counts = [-(-n // slice_tokens) for n in lengths]
        order = torch.randperm(sum(counts) + 3)
        self.keys = torch.full((len(order), kv_heads, slice_tokens, d), float("nan"), dtype=dtype, device=device)
        self.values = torch.full((len(order), kv_heads, slice_tokens, dv), float("nan"), dtype=dtype, device=device)
        table = torch.full((len(lengths), width or max(1, *counts)), -7, dtype=torch.int32)
        first = 0
        for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
            table[b, :count] = order[first : first + count]
            first += count
            place = torch.arange(n)
            index = table[b].long()[place // slice_tokens].to(device)
            inside = (place % slice_tokens).to(device)
            self.keys[index, :, inside], self.values[index, :, inside] = self.k[b], self.v[b]
        self.table = table.to(device)
        self.context = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.cu_q = borders(new, device)

    def arguments(self):
        return self.q, self.keys, self.values, self.table, self.context, self.cu_q

    def definition(self, dtype, scale, window, softcap):
        parts = zip(self.q.split(self.new), self.k, self.v, strict=True)
        wide = [[x.to(dtype) for x in part] for part in parts]
        return torch.cat([naive.attend(*part, scale, window or None, softcap or None) for part in wide])
