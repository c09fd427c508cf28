"""What our ops hold beside their arguments and results while they run on the CPU, in bytes: packed operands and blocks.

A trace on the meta device sees results only. Sizes follow csrc/cpu (lora_product, head_tiles) and ops/logprob (head,
sweep), whose constants are repeated here; what is below 100 KB is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob import head, native, tiles

TILE = 32  # rows of a packed tile
LEFT_BYTES, LEAST_TILES, MOST_TILES = 16 << 20, 8, 64  # of packed rows at a time
PANEL_BYTES = 768 << 10  # of packed columns at a time
TILE_ROWS = 1024  # of the bf16 head at a time
KEPT_A_SHAPE = 560_000  # oneDNN's compiled bf16 product of each shape, which it caches (measured, 0.55 to 0.60 MB)
PRODUCTS = 40  # that two caches may hold: every length of a row is a shape of its own, and their own limit is 1,024
KEPT_OF_ALL = 13_500_000  # in both when they are full (measured, 13.4 to 13.8 MB)
OBJECTS, GENERATOR = 700_000, 1_300_000  # Python's objects for a model, and what a generator keeps (measured)
KEPT_FP32 = 2 << 20  # MKL's packing buffers, which it does not give back (measured, up to 1.9 MB a thread)


def scratch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]) -> int:
    """Bytes that the op `func` holds at its peak beyond its arguments and results."""
    name = func.name() if hasattr(func, "name") else ""
    if name == "rlhf_kernels::lora_linears":
        return _linears(*args[:5])
    if name == "rlhf_kernels::lora_linears_backward":
        return _linears_backward(args[0], args[1], args[2])
    if name == "rlhf_kernels::linear_logprob":
        return max(0, _head(args) - sum(t.nbytes for t in results))
    if name == "rlhf_kernels::linear_logprob_backward":
        return _head_backward(args[3], args[4], args[15])
    if name == "rlhf_kernels::linear_logprob_scaled_vectors":
        return 4 * args[1].numel() if args[1].dtype != torch.float32 else 0
    return 0


def kept(products: set[tuple[Any, ...]], lengths_vary: bool) -> int:
    """Bytes that the vendor's libraries hold on to after products of these dtypes and shapes, or of many more; and
    Python's objects.
    """
    narrow = sum(key[0] == torch.bfloat16 for key in products)
    cached = KEPT_OF_ALL if narrow and lengths_vary else KEPT_A_SHAPE * min(narrow, PRODUCTS)
    single = (4 * (m.numel() + k.numel()) for dtype, m, k in products if dtype == torch.float32)
    objects = OBJECTS + GENERATOR * lengths_vary
    return objects + cached + min(KEPT_FP32, max(single, default=0))


def _packed(rows: int, depth: int, item: int) -> int:
    """Rows packed for a product: in equal blocks of at most so many tiles."""
    tile = max(1, TILE * depth * item)
    count = -(-rows // TILE)
    blocks = max(1, -(-count // min(max(LEFT_BYTES // tile, LEAST_TILES), MOST_TILES)))
    return -(-count // blocks) * tile


def _linears(x: Tensor, weights: list[Tensor], biases: list[Tensor], lora_a: list[Tensor], lora_b: list[Tensor]) -> int:
    if not lora_a:
        return 0
    item = x.element_size()
    columns = max(w.shape[0] for w in weights) * x.shape[1] * item
    ranks = sum(a.shape[0] for a in lora_a)
    return _packed(x.shape[0], x.shape[1], item) + min(PANEL_BYTES, columns) + x.shape[0] * ranks * item


def _linears_backward(grads: list[Tensor], weights: list[Tensor], lora_a: list[Tensor]) -> int:
    if not lora_a:
        return 0
    present = [g for g in grads if g.ndim == 2]
    rows, item = present[0].shape[0], present[0].element_size()
    ranks = sum(a.shape[0] for a in lora_a)
    depth = sum(g.shape[1] for g in present)
    columns = weights[0].shape[1] * depth * item
    return _packed(rows, depth, item) + min(PANEL_BYTES, columns) + rows * ranks * item


def _has_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and native.AVAILABLE and torch.ops.rlhf_kernels.bf16_isa() > 0


def _columns(rows: int, vocabulary: int, sides: int, tiled: bool) -> int:
    fits = head.BLOCK_BYTES // (4 * sides * max(1, rows))
    most = head.CACHED_COLUMNS if tiled else head.BLOCK_COLUMNS
    return min(most, max(head.MIN_COLUMNS, fits), vocabulary)


def _head(args: tuple[Any, ...]) -> int:
    """The most that `linear_logprob` holds, its results among it."""
    hidden, weight, reference, save = args[0], args[1], args[5], args[17]
    (rows, width), vocabulary, sides = hidden.shape, weight.shape[0], 1 + (reference is not None)
    vector = 4 * rows * width * (save == "grad_vector")
    states = 8 * 10 * rows * 4
    if _has_tiles(hidden.dtype):
        at_once = min(rows, TILE_ROWS)
        sweep = 2 * sides * at_once * width + tiles.SEGMENTS * (4 * at_once * width * (vector > 0) + 80 * rows)
        sweep += states + vector
    else:
        columns = _columns(rows, vocabulary, sides, False)
        operands = 0 if hidden.dtype == torch.float32 else 4 * width * (columns + sides * rows)
        sweep = 4 * sides * rows * columns + operands + vector + states
    finish = vector + vector // 2 * (hidden.dtype == torch.bfloat16) + (vector and 8 * min(rows, 1024) * width)
    return max(sweep, finish)


def _head_backward(hidden: Tensor, weight: Tensor, softcap: float) -> int:
    rows, width = hidden.shape
    tiled = _has_tiles(hidden.dtype)
    columns = _columns(rows, weight.shape[0], 1, tiled)
    block = 4 * rows * columns * (2 if softcap else 1)
    operands = 0 if tiled or hidden.dtype == torch.float32 else 4 * width * (columns + rows)
    outer = 2 * width * (columns + rows) if tiled else 4 * columns * width
    return block + operands + outer + 4 * rows * width
