"""Attention over the KV arena and over packed rows, beside torch's on padded batches and beside a read of the bytes.

Decoding reads every key and value once, so "read of the same bytes" is its yardstick: torch's maximum over one block of
memory of the size. Slices lie in random order in the arena, which is more than it holds in a cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import OURS, Case, Prepare, Target, ready
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.ops.attention import sliced_attention, sliced_step, varlen_attention

READ = "read of the same bytes"
SDPA = "torch SDPA, padded batch"
APART = "no shared slices"
WRITE_AND_READ = "write, then attention"
SLICE_TOKENS = 16
LAYERS = 8  # one after another, as a model has them: what a layer reads is not in the cache from the run before


@dataclass(frozen=True)
class Shape:
    sequences: int
    context: int
    kv_heads: int = 8
    group: int = 1
    d: int = 64
    dtype: torch.dtype = torch.bfloat16
    spread: bool = False  # contexts from a quarter of `context` up to it; else all the same
    samples: int = 1  # of a prompt: they share its slices
    prompt: int = 0

    def text(self) -> str:
        precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        heads = f"{self.kv_heads * self.group} heads x {self.d}, {self.kv_heads} of keys"
        return f"{self.sequences} sequences x {'up to ' * self.spread}{self.context} tokens, {heads}, {precision}"


DECODE = (
    Shape(64, 128, spread=True),
    Shape(64, 1024, kv_heads=2, group=4, spread=True),
    Shape(4, 4096, kv_heads=2, group=4),
    Shape(1, 4096, group=4, d=128),
    Shape(64, 128, spread=True, dtype=torch.float32),
)
SHARED = (  # a greedy and a sampled answer, four samples, sixteen
    Shape(64, 128, samples=2, prompt=96),
    Shape(64, 128, samples=4, prompt=96),
    Shape(16, 1056, samples=2, prompt=1024),
    Shape(16, 1056, samples=4, prompt=1024),
    Shape(16, 1056, samples=16, prompt=1024),
)
PREFILL = (Shape(16, 96), Shape(2, 1024), Shape(2, 1024, kv_heads=2, group=4), Shape(2, 1024, dtype=torch.float32))


@dataclass
class Inputs:
    q: Tensor
    arena: Arena
    table: Tensor
    lengths: Tensor
    cu_q: Tensor

    def attend(self) -> list[Tensor]:
        places = self.table, self.lengths, self.cu_q
        return [sliced_attention(self.q, self.arena, layer, *places) for layer in range(LAYERS)]


def decode_inputs(shape: Shape, device: str, shares: bool = True) -> Inputs:
    torch.manual_seed(0)
    n, per = shape.sequences, -(-shape.context // SLICE_TOKENS)
    shared = shape.prompt // SLICE_TOKENS if shares else 0
    family = torch.arange(n) // shape.samples
    own = torch.arange(n)[:, None] * (per - shared) + torch.arange(per - shared)
    of_family = n * (per - shared) + family[:, None] * shared + torch.arange(shared)
    table = torch.cat([of_family, own], 1)
    slices = int(table.max()) + 1
    slice_bytes = SLICE_TOKENS * shape.kv_heads * 2 * shape.d * shape.dtype.itemsize
    layers = [(shape.kv_heads, shape.d, shape.d)] * LAYERS
    arena = Arena(layers, slices * slice_bytes * LAYERS + 4096, SLICE_TOKENS, shape.dtype, torch.device(device))
    for view in (*arena.keys, *arena.values):
        view.normal_()
    lengths = torch.linspace(shape.context // 4, shape.context, n) if shape.spread else torch.full((n,), shape.context)
    q = torch.randn(n, shape.kv_heads * shape.group, shape.d, device=device).to(shape.dtype)
    table = torch.randperm(slices)[table]
    cu_q = torch.arange(n + 1, dtype=torch.int32, device=device)
    return Inputs(q, arena, table.int().to(device), lengths.int().to(device), cu_q)


def decode(shape: Shape, device: str) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        small = replace(shape, sequences=2, context=32) if tiny else shape
        inputs = decode_inputs(small, device)
        tokens = int(inputs.lengths.sum()) * LAYERS
        row = small.kv_heads * 2 * small.d * small.dtype.itemsize
        block = torch.randn(tokens * row // 4, device=device)
        padded = [
            torch.randn(small.sequences, small.kv_heads, small.context, small.d, device=device).to(small.dtype)
            for _ in range(2 * LAYERS)
        ]
        seen = torch.arange(small.context, device=device) < inputs.lengths[:, None]
        q = inputs.q[:, :, None]

        def sdpa() -> list[Tensor]:
            layers = zip(padded[0::2], padded[1::2], strict=True)
            mask = seen[:, None, None] if small.spread else None
            return [F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=small.group > 1) for k, v in layers]

        return {READ: ready(block.amax), SDPA: ready(sdpa), OURS: ready(inputs.attend)}

    targets = (Target(READ, at_most=2.5), Target(SDPA, at_least=1.0))
    return Case(f"decode: {shape.text()}", build, READ, targets, memory=False)


def shared(shape: Shape, device: str) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        small = replace(shape, sequences=4, context=64, prompt=32, samples=2) if tiny else shape
        return {
            APART: ready(decode_inputs(small, device, shares=False).attend),
            OURS: ready(decode_inputs(small, device).attend),
        }

    name = f"decode, {shape.samples} samples of a prompt of {shape.prompt} tokens: {shape.text()}"
    return Case(name, build, APART, (Target(APART, at_least=1.3 if shape.samples == 2 else 1.6),), memory=False)


def step(shape: Shape, device: str) -> Case:
    """A layer's write and attention in one op against two."""

    def build(tiny: bool) -> dict[str, Prepare]:
        inputs = decode_inputs(replace(shape, sequences=2) if tiny else shape, device)
        n, places = len(inputs.q), (inputs.table, inputs.lengths, inputs.cu_q)
        last = inputs.lengths.long() - 1
        rows = torch.arange(n, device=device)
        slots = inputs.table[rows, last // SLICE_TOKENS].long() * SLICE_TOKENS + last % SLICE_TOKENS
        k, v = (torch.randn(n, shape.kv_heads, shape.d, device=device).to(shape.dtype) for _ in range(2))

        def two() -> None:
            for layer in range(LAYERS):
                inputs.arena.write(layer, slots, k, v)
                sliced_attention(inputs.q, inputs.arena, layer, *places)

        def one() -> None:
            for layer in range(LAYERS):
                sliced_step(inputs.q, k, v, inputs.arena, layer, slots, *places)

        return {WRITE_AND_READ: ready(two), OURS: ready(one)}

    return Case(f"a step's write and attention: {shape.text()}", build, WRITE_AND_READ, memory=False)


def prefill(shape: Shape, device: str) -> Case:
    """Whole sequences of one length, so that torch's batch has no padding."""

    def build(tiny: bool) -> dict[str, Prepare]:
        torch.manual_seed(0)
        n, tokens = (1, 16) if tiny else (shape.sequences, shape.context)
        heads = shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads
        q, k, v = (torch.randn(1, h, n * tokens, shape.d, device=device).to(shape.dtype) for h in heads)
        cu = torch.arange(n + 1, dtype=torch.int32, device=device) * tokens
        batch_q, batch_k, batch_v = (x[0].unflatten(1, (n, tokens)).transpose(0, 1).contiguous() for x in (q, k, v))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))

        def sdpa() -> Tensor:
            gqa = shape.group > 1
            return F.scaled_dot_product_attention(batch_q, batch_k, batch_v, is_causal=True, enable_gqa=gqa)

        return {SDPA: ready(sdpa), OURS: ready(lambda: varlen_attention(q, k, v, cu))}

    return Case(f"prefill: {shape.text()}", build, SDPA, (Target(SDPA, at_least=1.0),), memory=False)


def cases(device: str = "cpu") -> Iterator[Case]:
    kinds: tuple[tuple[Callable[[Shape, str], Case], tuple[Shape, ...]], ...] = (
        (decode, DECODE),
        (shared, SHARED),
        (step, (Shape(64, 128), Shape(4, 128))),
        (prefill, PREFILL),
    )
    for make, shapes in kinds:
        for shape in shapes:
            yield make(shape, device)
