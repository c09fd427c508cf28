"""The head as a sweep sees it: the rows that count (ignored ones are compacted away), the matrices they meet, adapters,
this rank's shard of the vocabulary; and its logits, a block of columns at a time. Scratch memory is one block.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob.native import has_tiles, row_passes

BLOCK_COLUMNS = 4096
BLOCK_BYTES = 64 << 20  # of fp32 logits, policy and reference together
MIN_COLUMNS = 64
CACHED_COLUMNS = 1024  # on the CPU in bf16: there the products are fast enough for a block's way to memory to count


def mm_fp32(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out = x w^T with fp32 accumulation and result; operands as `operand` leaves them."""
    if x.dtype == torch.float32:
        torch.mm(x, w.t(), out=out)
    elif x.device.type == "cpu":
        torch.ops.rlhf_kernels.bf16_logits(x, w, out)
    else:
        torch.ops.aten.mm.dtype_out(x, w.t(), torch.float32, out=out)


def pull(dz: Tensor, w: Tensor, total: Tensor) -> None:
    """total fp32 += dz w with fp32 accumulation; dz fp32 takes w's dtype."""
    if w.dtype != torch.bfloat16:  # fp16 has not the range of dz
        total.addmm_(dz, w.float())
    elif w.device.type == "cpu":
        torch.ops.rlhf_kernels.bf16_pull(dz, w, total)
    else:
        torch.ops.aten.addmm.dtype_out(total, dz.to(w.dtype), w, torch.float32, out=total)


def outer(dz: Tensor, x: Tensor, out: Tensor) -> None:
    """out = dz^T x for rows of a weight's gradient, in the weight's dtype."""
    if x.device.type == "cpu" and x.dtype == out.dtype == torch.bfloat16 and out.stride(1) == 1:
        torch.ops.rlhf_kernels.bf16_outer(dz, x, out)
    else:
        out.copy_(dz.t() @ x.float())


def operand_dtype(matrices: Iterable[Tensor]) -> torch.dtype:
    """What a head's GEMMs take: half precision if all its matrices are of one, and products with fp32 accumulators are
    at hand (bf16 and fp16 on a GPU, bf16 on some CPUs); else fp32."""
    first, *others = matrices
    on_gpu = first.device.type == "cuda" and first.dtype in (torch.bfloat16, torch.float16)
    kept = (on_gpu or has_tiles(first)) and all(x.dtype == first.dtype for x in others)
    return first.dtype if kept else torch.float32


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a GEMM operand."""
    x = x.to(dtype)
    return x.contiguous() if dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(1) != 1 else x


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
        if 0 in before:  # said on every rank, so that none waits for another
            raise ValueError(
                f"weight has no rows on rank {before.index(0)} of tp_group; every rank must hold at least one token"
            )
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

    x, ref [R, H] GEMM operands of one dtype, which the weights' blocks take too; target int64 [R], counted from this
    shard's first column; temperature fp32 [R].
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

    def of_rows(self, rows: Tensor | slice) -> "Head":
        """This head for some of its rows (int64 [n] or a slice); it must have no adapters and no saved logits."""
        ref = None if self.ref is None else self.ref[rows]
        target, temperature = self.target[rows], self.temperature[rows]
        return replace(self, x=self.x[rows], ref=ref, target=target, temperature=temperature)

    def columns_per_block(self, sides: int) -> int:
        fits = BLOCK_BYTES // (4 * sides * max(1, self.rows))
        most = CACHED_COLUMNS if self.x.device.type == "cpu" and self.x.dtype == torch.bfloat16 else BLOCK_COLUMNS
        return min(most, max(MIN_COLUMNS, fits), max(1, self.weight.shape[0]))

    def blocks(self, reference: bool) -> Iterator[Block]:
        """Every block of logits, raw (without bias, scale, softcap, temperature) unless they were saved."""
        vocabulary, rows = self.weight.shape[0], self.rows
        sides = 2 if reference else 1
        step = self.columns_per_block(sides)
        buffer = torch.empty(sides * rows * step, dtype=torch.float32, device=self.x.device)
        # A CPU library's fp32 product gives a row other bits at another place; two of one shape give the same.
        one_product = reference and self.ref_weight is None and not (self.x.is_cpu and self.x.dtype == torch.float32)
        both = torch.cat([self.x, self.ref]) if one_product else None  # type: ignore[list-item]
        for start in range(0, vocabulary, step):
            stop = min(start + step, vocabulary)
            w = operand(self.weight[start:stop], self.x.dtype)
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
                    other = w if self.ref_weight is None else operand(self.ref_weight[start:stop], self.x.dtype)
                    mm_fp32(self.ref, other, zr)  # type: ignore[arg-type]
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
        pull(dz, block.weight, self.total)
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
