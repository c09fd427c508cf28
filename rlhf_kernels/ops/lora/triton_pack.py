"""Adapters as the kernels take them: one contiguous tensor for all adapters of a projection, or of several.

Where they are already neighbours in one tensor of the right dtype, as the slices of a stacked parameter are, that
tensor is used as it is; else they are copied (cast, and padded with zeros to the largest rank): n r K elements.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked_a(lora_a: Sequence[Tensor], n: int, ranks: Sequence[int], width: int, like: Tensor) -> Tensor:
    """[n, sum of ranks, K] of the dtype and on the device of `like`: entry p * n + e of lora_a [r, K] in the rows of
    projection p, zeros below its rank."""
    if len(ranks) == 1 and (base := _neighbours(lora_a, n, (ranks[0], width), like.dtype)) is not None:
        return base
    ragged = any(a.shape[0] != ranks[p] for p in range(len(ranks)) for a in lora_a[p * n : p * n + n])
    pack = _empty(ragged, (n, sum(ranks), width), like)
    starts = [sum(ranks[:p]) for p in range(len(ranks))]
    places = [pack[i % n, starts[i // n] : starts[i // n] + a.shape[0]] for i, a in enumerate(lora_a)]
    return _filled(pack, places, lora_a)


def stacked_b(lora_b: Sequence[Tensor], rank: int, width: int, like: Tensor) -> Tensor:
    """[n, N, rank] from one projection's [N, r], zeros beyond an adapter's own rank; see `stacked_a`."""
    n = len(lora_b)
    if (base := _neighbours(lora_b, n, (width, rank), like.dtype)) is not None:
        return base
    pack = _empty(any(b.shape[1] != rank for b in lora_b), (n, width, rank), like)
    return _filled(pack, [pack[e, :, : b.shape[1]] for e, b in enumerate(lora_b)], lora_b)


def _neighbours(tensors: Sequence[Tensor], n: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """[n, *shape] over the storage that holds all tensors one after the other, if one does."""
    if n == 0 or any(t.shape != shape or t.dtype != dtype or not t.is_contiguous() for t in tensors):
        return None
    first, size = tensors[0], shape[0] * shape[1]
    storage = first.untyped_storage().data_ptr()
    for e, tensor in enumerate(tensors):
        there = tensor.untyped_storage().data_ptr() == storage
        if not there or tensor.storage_offset() != first.storage_offset() + e * size:
            return None
    return first.as_strided((n, *shape), (size, shape[1], 1))


def _empty(ragged: bool, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape) if ragged else like.new_empty(shape)


def _filled(pack: Tensor, places: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    pairs = [(place, tensor) for place, tensor in zip(places, tensors) if tensor.numel()]
    if pairs:
        torch._foreach_copy_([place for place, _ in pairs], [tensor.detach() for _, tensor in pairs])
    return pack
