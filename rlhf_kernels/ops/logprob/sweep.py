"""Sweeps over the vocabulary in blocks: a library GEMM gives a block of fp32 logits, a row pass turns it into what is
needed, and for gradients a second GEMM takes it back. Scratch memory is one block, never [rows, V].

A `Head` holds the rows that count (ignored ones are compacted away) and yields blocks of logits; `statistics`, `js`,
`grad_vector` and `pull` are the four things done with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob.native import row_passes

BLOCK_COLUMNS = 4096
BLOCK_BYTES = 64 << 20  # of fp32 logits, policy and reference together
MIN_COLUMNS = 64


def mm_fp32(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out = x w^T with fp32 accumulation and result; operands as `operand` leaves them."""
    if x.dtype == torch.float32:
        torch.mm(x, w.t(), out=out)
    else:
        out.copy_(torch.mm(x, w.t(), out_dtype=torch.float32))


def operand(x: Tensor) -> Tensor:
    """A GEMM operand: bf16 stays on CUDA (fp32 accumulators are at hand there), all else becomes fp32."""
    return x if x.device.type == "cuda" and x.dtype == torch.bfloat16 else x.float()


@dataclass
class Shard:
    """This rank's part of a vocabulary split over a process group; without a group the whole of it."""

    group: Any = None
    offset: int = 0

    @staticmethod
    def of(name: str, columns: int, device: torch.device) -> tuple["Shard", int]:
        """The shard of the group called `name` ("" for none) and the size of the whole vocabulary."""
        if not name:
            return Shard(), columns
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
        sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([columns], dtype=torch.int64, device=device), group=group)
        before = [int(s) for s in sizes]
        return Shard(group, sum(before[: dist.get_rank(group)])), sum(before)

    def sum(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def merge(self, mine: Tensor, reference: bool) -> Tensor:
        """The state of the whole vocabulary from this shard's."""
        if self.group is None:
            return mine
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine.contiguous(), group=self.group)
        whole = parts[0]
        for part in parts[1:]:
            whole = st.merge(whole, part, reference)
        return whole


@dataclass
class LowRank:
    """One adapter on the head: rows (None: all), S = x A^T [rows, r] and both factors in fp32."""

    rows: Tensor | None
    s: Tensor
    a: Tensor
    b: Tensor
    scaling: Tensor
    slot: int

    def add_to(self, z: Tensor, start: int, stop: int) -> None:
        update = (self.s * self.scaling) @ self.b[start:stop].t()
        if self.rows is None:
            z.add_(update)
        else:
            z.index_add_(0, self.rows, update)

    def of_rows(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def add_rows(self, out: Tensor, update: Tensor) -> None:
        if self.rows is None:
            out.add_(update)
        else:
            out.index_add_(0, self.rows, update)


@dataclass
class Block:
    """Columns start..stop: logits z (and zr) [rows, n] and the weight rows as a GEMM operand."""

    start: int
    stop: int
    weight: Tensor
    z: Tensor
    zr: Tensor | None
    raw: bool


@dataclass
class Head:
    """The rows that count and the matrices they meet; all tensors on one device.

    x, ref [R, H] GEMM operands; target int64 [R], counted from this shard's first column; temperature fp32 [R].
    saved: z (and zr) [1 or 2, R, V] kept from the forward, which then replace the GEMM.
    """

    x: Tensor
    ref: Tensor | None
    weight: Tensor
    ref_weight: Tensor | None
    bias: Tensor | None
    target: Tensor
    temperature: Tensor
    softcap: float
    scale: float
    low_rank: list[LowRank] = field(default_factory=list)
    shard: Shard = field(default_factory=Shard)
    saved: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.x.device)

    def columns_per_block(self, sides: int) -> int:
        fits = BLOCK_BYTES // (4 * sides * max(1, self.rows))
        return min(BLOCK_COLUMNS, max(MIN_COLUMNS, fits), max(1, self.weight.shape[0]))

    def blocks(self, reference: bool) -> Iterator[Block]:
        """Every block of logits, raw (without bias, scale, softcap, temperature) unless they were saved."""
        vocabulary, rows = self.weight.shape[0], self.rows
        sides = 2 if reference else 1
        step = self.columns_per_block(sides)
        buffer = torch.empty(sides * rows * step, dtype=torch.float32, device=self.x.device)
        both = torch.cat([self.x, self.ref]) if reference and self.ref_weight is None else None  # type: ignore[list-item]
        for start in range(0, vocabulary, step):
            stop = min(start + step, vocabulary)
            w = operand(self.weight[start:stop])
            logits = buffer[: sides * rows * (stop - start)].view(sides, rows, stop - start)
            z, zr = logits[0], logits[1] if reference else None
            if self.saved is not None:
                logits.copy_(self.saved[:sides, :, start:stop])
                yield Block(start, stop, w, z, zr, False)
                continue
            if both is not None:
                mm_fp32(both, w, logits.view(2 * rows, stop - start))
            else:
                mm_fp32(self.x, w, z)
                if zr is not None:
                    mm_fp32(self.ref, operand(self.ref_weight[start:stop]), zr)  # type: ignore[arg-type,index]
            for adapter in self.low_rank:
                adapter.add_to(z, start, stop)
            yield Block(start, stop, w, z, zr, True)

    def shaping(self, block: Block) -> tuple[Tensor | None, Tensor, float, float]:
        """The row passes' common arguments: the block's bias, temperature, softcap, scale."""
        bias = None if self.bias is None else self.bias[block.start : block.stop].float().contiguous()
        return bias, self.temperature, self.softcap, self.scale

    def passes(self) -> Any:
        return row_passes(self.x.device)

    def target_rows(self) -> Tensor:
        """The target's effective weight row, W_y + scaling A^T B_y, fp32 [R, H]; 0 where another shard holds it."""
        here = (self.target >= 0) & (self.target < self.weight.shape[0])
        safe = torch.where(here, self.target, 0)
        out = self.weight[safe].float()
        for adapter in self.low_rank:
            adapter.add_rows(out, (adapter.b[adapter.of_rows(safe)] * adapter.scaling) @ adapter.a)
        return out * here[:, None]


class Pullback:
    """Accumulates d hidden [R, H] in fp32 from blocks of d logits, through the weight and the adapters."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.total = head.new(head.rows, head.x.shape[1])
        self.s = [torch.zeros_like(adapter.s) for adapter in head.low_rank]

    def add(self, dz: Tensor, block: Block) -> None:
        if block.weight.dtype == torch.float32:
            self.total.addmm_(dz, block.weight)
        else:
            self.total.add_(torch.mm(dz.to(block.weight.dtype), block.weight, out_dtype=torch.float32))
        for adapter, s in zip(self.head.low_rank, self.s):
            s.add_(adapter.of_rows(dz) @ adapter.b[block.start : block.stop])

    def scale(self, factor: Tensor) -> None:
        """Multiplies what is there by factor [R]; on the CPU only if some row needs it."""
        if factor.device.type == "cpu" and bool((factor == 1).all()):
            return
        self.total.mul_(factor[:, None])
        for adapter, s in zip(self.head.low_rank, self.s):
            s.mul_(adapter.of_rows(factor[:, None]))

    def finish(self) -> Tensor:
        for adapter, s in zip(self.head.low_rank, self.s):
            adapter.add_rows(self.total, (s * adapter.scaling) @ adapter.a)
        return self.total


def statistics(
    head: Head, reference: bool, kl: bool, rkl: bool, full: bool, grad: bool, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One sweep: the state [10, R], and with `grad` the vector d logprob / d hidden [R, H] in fp32.

    full: entropy or reference fields are asked for (without, the state's log-masses and target suffice).
    keep: [1 or 2, R, V], filled with z (and zr).

    The vector: E' = e^(z - c) without the target, G = (E' W / S' - W_y) (1 - p_y), all in one pass. c is the first
    block's maximum; where a later block exceeds it by 60, what was summed is scaled down.
    """
    passes = head.passes()
    total: Tensor | None = None
    shift, factor = head.new(head.rows), head.new(head.rows)
    mass = head.new(head.rows, dtype=torch.float64)
    target_z = torch.full_like(mass, float("-inf"))
    pull = Pullback(head) if grad else None
    for block in head.blocks(reference):
        raw = block.raw
        if full or not grad:
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
    if pull is None:
        assert total is not None
        return head.shard.merge(total, reference), None
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
    weight_y = head.target_rows()
    if head.softcap > 0:
        t = own_target.clamp(min=-head.softcap * 1e3) * head.temperature / head.softcap
        weight_y.mul_((1 - t.square()).float()[:, None])
    spread = torch.where(whole_mass > 0, down / whole_mass, 0).float()
    vector = pull.finish().mul_(spread[:, None]).sub_(weight_y)
    vector.mul_((-miss * head.scale / head.temperature).float()[:, None])
    return total, head.shard.sum(vector)


def split(x: Tensor) -> Tensor:
    """An fp64 [R] as the sum of two fp32, [2, R]."""
    high = x.float()
    return torch.stack((high, (x - high).float()))


def js(head: Head, lse: Tensor, ratio: Tensor) -> Tensor:
    """A second sweep: JS and KL(p || (p + q) / 2), fp64 [2, R], from the normalisers of the first."""
    sums = head.new(2, head.rows, dtype=torch.float64)
    two, ratio32 = split(lse), ratio.float()
    for block in head.blocks(True):
        head.passes().head_js(block.z, block.zr, *head.shaping(block), block.raw, two, ratio32, sums)
    return head.shard.sum(sums)


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
            d_weight[columns] = block.z.t() @ head.x.float()
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
