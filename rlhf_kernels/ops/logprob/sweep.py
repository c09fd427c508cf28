"""Sweeps over the vocabulary in blocks: a library GEMM gives a block of fp32 logits, a row pass turns it into what is
needed, and for gradients a second GEMM takes it back. Never are [rows, V] logits held.

`statistics`, `js` and `pull` are the things done with a `Head`'s blocks.
"""

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob import tiles
from rlhf_kernels.ops.logprob.head import Head, Pullback, outer
from rlhf_kernels.ops.logprob.tier import fused

FINISHED_ROWS = 1024  # whose W_y are gathered at a time


def statistics(
    head: Head, reference: bool, kl: bool, rkl: bool, full: bool, grad: bool, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One sweep: the state [10, R], and with `grad` the vector d logprob / d hidden [R, H] in fp32.

    full: entropy or reference fields are asked for (without, the state's log-masses and target suffice).
    keep: [1 or 2, R, V], filled with z (and zr).
    """
    states = full or not grad
    tier = fused(head) if keep is None else None
    found = st.Swept(None, None) if tier is None else tier.sweep(head, reference, kl, rkl, states, grad)
    total, parts, void = found
    if void is not None and total is not None:
        again, _ = _blocks(head.of_rows(void), reference, kl, rkl, True, False, None)
        assert again is not None
        total.index_copy_(1, void, again)
    states_left, grad_left = states and total is None, grad and parts is None
    if states_left or grad_left:
        swept = _blocks(head, reference, kl, rkl, states_left, grad_left, keep)
        total, parts = total if total is not None else swept[0], parts if parts is not None else swept[1]
    if parts is None:
        assert total is not None
        return head.shard.merge(total, reference), None
    return _finish(head, reference, total, parts)


def _blocks(
    head: Head, reference: bool, kl: bool, rkl: bool, states: bool, grad: bool, keep: Tensor | None
) -> tuple[Tensor | None, st.Parts | None]:
    """The sweep by blocks: the state, and the parts of the vector.

    E' = e^(z - c) without the target, where c is the first block's maximum; where a later block exceeds it by 60, what
    was summed is scaled down.
    """
    passes = head.passes()
    total: Tensor | None = None
    shift, factor = head.new(head.rows), head.new(head.rows)
    mass = head.new(head.rows, dtype=torch.float64)
    target_z = torch.full_like(mass, float("-inf"))
    pull = Pullback(head) if grad else None
    for block in head.blocks(reference and (states or keep is not None)):
        raw = block.raw
        if states:
            part = head.new(10, head.rows, dtype=torch.float64)
            passes.head_stats(block.z, block.zr, head.target - block.start, *head.shaping(block), raw, kl, rkl, part)
            total = part if total is None else st.merge(total, part, reference)
            raw = False
        if keep is not None:
            keep[0, :, block.start : block.stop] = block.z
            if block.zr is not None:
                keep[1, :, block.start : block.stop] = block.zr
        if pull is not None:
            first = block.start == 0
            local = head.target - block.start
            passes.head_exp(block.z, local, *head.shaping(block), raw, first, shift, mass, factor, target_z)
            if not first:
                pull.scale(factor)
            pull.add(block.z, block)
    return total, None if pull is None else st.Parts(shift, mass, target_z, pull.finish())


def _finish(head: Head, reference: bool, total: Tensor | None, parts: st.Parts) -> tuple[Tensor, Tensor]:
    """The state of the whole vocabulary and the vector G = (E' W / S' - W_y) (1 - p_y), merged over the shards."""
    shift, mass, target_z, pulled = parts
    own_target = target_z.clone()
    whole_shift = head.shard.max(shift.clone())
    down = (shift - whole_shift).double().exp()
    whole_mass = head.shard.sum(mass * down)
    target_z = head.shard.max(target_z)
    rest = (whole_shift.double() + whole_mass.log()).clamp(min=-1e30)
    if total is None:
        total = head.new(10, head.rows, dtype=torch.float64)
        total[st.LSE], total[st.REST], total[st.TARGET] = torch.logaddexp(rest, target_z), rest, target_z
    else:
        total = head.shard.merge(total, reference)
    miss = torch.sigmoid(rest - target_z)  # 1 - p_y
    spread = torch.where(whole_mass > 0, down / whole_mass, 0).float()[:, None]
    lost = (-miss * head.scale / head.temperature).float()[:, None]
    step = max(1, head.rows) if head.low_rank else FINISHED_ROWS  # an adapter's rows are named for the whole head
    for i in range(0, head.rows, step):
        part = slice(i, i + step)
        weight_y = (head if head.low_rank else head.of_rows(part)).target_rows()
        if head.softcap > 0:
            t = own_target[part].clamp(min=-head.softcap * 1e3) * head.temperature[part] / head.softcap
            weight_y.mul_((1 - t.square()).float()[:, None])
        pulled[part].mul_(spread[part]).sub_(weight_y).mul_(lost[part])
    return total, head.shard.sum(pulled)


def split(x: Tensor) -> Tensor:
    """An fp64 [R] as the sum of two fp32, [2, R]."""
    high = x.float()
    return torch.stack((high, (x - high).float()))


def js(head: Head, lse: Tensor, ratio: Tensor) -> Tensor:
    """A second sweep: JS and KL(p || (p + q) / 2), fp64 [2, R], from the normalisers of the first.

    A GPU's tier and the row passes may round z differently: an ulp of a logit near 100 is 1e-5, and JS then needs the
    normalisers of the blocks' own logits. The CPU's tiles round as the blocks do.
    """
    if head.saved is None and fused(head) not in (None, tiles):
        own, _ = _blocks(head, True, True, False, True, False, None)
        assert own is not None
        own = head.shard.merge(own, True)
        lse, ratio = own[st.LSE], own[st.DIFFERENCE]
    sums = head.new(2, head.rows, dtype=torch.float64)
    two, ratio32 = split(lse), ratio.float()
    for block in head.blocks(True):
        head.passes().head_js(block.z, block.zr, *head.shaping(block), block.raw, two, ratio32, sums)
    sums = head.shard.sum(sums).masked_fill(ratio.isnan(), float("nan"))  # the sums leave NaN columns out
    sums[0] -= (ratio - ratio32) * (sums[0] - 0.5 * sums[1])  # d JS / d ratio is -KL(q || (p + q) / 2) / 2
    return sums


def coefficients(stats: dict[str, Tensor], grads: dict[str, Tensor]) -> Tensor:
    """Upstream gradients [R] of each field folded into what a row's dz needs, fp32 [10, R] (see csrc's head_grad)."""
    rows = next(iter(stats.values()))
    zero = torch.zeros_like(rows)
    g = {name: grads[name].double() if name in grads else zero for name in ("logprob", "lse", "entropy", "kl")}
    g_rkl, g_js = (grads[name].double() if name in grads else zero for name in ("rkl", "js"))
    constant = g["lse"] - g["logprob"] - g["entropy"] * stats["entropy"] - g["kl"] * stats["kl"]
    constant = constant - 0.5 * g_js * stats["kl_mean"]
    miss = g["logprob"] * stats["miss"]
    columns = (stats["ratio"], constant, -g["entropy"], g["kl"], g_rkl, 0.5 * g_js, g["logprob"], miss)
    return torch.cat((split(stats["lse"]), torch.stack(columns).float()))


def pull(
    head: Head, stats: dict[str, Tensor], grads: dict[str, Tensor], need: dict[str, Tensor | None]
) -> Tensor | None:
    """One sweep of gradients: returns d hidden fp32 [R, H] if need has "hidden", and fills the other tensors of `need`.

    need: "hidden", "weight" [V, H], "bias" [V], "lora_a" [n, r, H], "lora_b" [n, V, r] (absent: not wanted).
    """
    if head.rows == 0:
        return head.new(0, head.x.shape[1]) if "hidden" in need else None
    ratio_fields = bool({"kl", "rkl", "js"} & grads.keys())
    folded = coefficients(stats, grads)
    back = Pullback(head) if "hidden" in need or "lora_a" in need else None
    passes = head.passes()
    scratch = None
    for block in head.blocks(ratio_fields):
        if head.softcap > 0 and (scratch is None or scratch.shape != block.z.shape):
            scratch = torch.empty_like(block.z)
        passes.head_grad(block.z, block.zr, head.target - block.start, *head.shaping(block), block.raw, folded, scratch)
        columns = slice(block.start, block.stop)
        if back is not None:
            back.add(block.z, block)
        if (d_weight := need.get("weight")) is not None:
            outer(block.z, head.x, d_weight[columns])
        if (d_bias := need.get("bias")) is not None:
            d_bias[columns] = block.z.sum(0)
        if (d_b := need.get("lora_b")) is not None:
            for adapter in head.low_rank:
                d_b[adapter.slot, columns] = adapter.of_rows(block.z).t() @ (adapter.s * adapter.scaling)
    if back is None:
        return None
    if (d_a := need.get("lora_a")) is not None:
        for adapter, s in zip(head.low_rank, back.s):
            d_a[adapter.slot] = head.shard.sum(s * adapter.scaling).t() @ adapter.of_rows(head.x.float())
    return head.shard.sum(back.finish()) if "hidden" in need else None
