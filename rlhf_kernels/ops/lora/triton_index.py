"""Index and scaling as device tensors where the caller has them on the host.

Both are written by fills on the device, which a graph capture takes as it does kernels; nothing is copied from the
host, so nothing waits. Outside of a capture the latest few are kept for the next layer, each for its stream.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rlhf_kernels.ops.lora.library import triples
from rlhf_kernels.ops.lora.triton_launch import Rows

KEPT = 32


def rows_of(
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    total: int,
    device: torch.device,
) -> Rows:
    """The rows of a call; see `tier.Tier`."""
    if index is None:
        assert runs is not None
        index = _on_device(device, _index, tuple(runs), total)
    if scaling_tensor is None:
        scaling_tensor = _on_device(device, _scaling, tuple(scaling), len(scaling))
    index, order = index.contiguous(), None if order is None else order.contiguous()
    return Rows(index, scaling_tensor.contiguous(), order, total, total, len(scaling))


def _on_device(device: torch.device, make: Callable[..., Tensor], values: tuple, length: int) -> Tensor:
    if device.type != "cuda":
        return make(device, values, length)
    if torch.cuda.is_current_stream_capturing():  # its memory belongs to the graph
        return make(device, values, length)
    return _kept(device, torch.cuda.current_stream(device).cuda_stream, make, values, length)


@lru_cache(maxsize=KEPT)
def _kept(device: torch.device, stream: int, make: Callable[..., Tensor], values: tuple, length: int) -> Tensor:
    return make(device, values, length)


def _index(device: torch.device, runs: tuple[int, ...], rows: int) -> Tensor:
    index = torch.full((rows,), -1, device=device, dtype=torch.int32)
    for lo, hi, adapter in triples(runs):
        if adapter >= 0:
            index[lo:hi].fill_(adapter)
    return index


def _scaling(device: torch.device, values: tuple[float, ...], n: int) -> Tensor:
    made = torch.full((n,), values[0] if values else 1.0, device=device, dtype=torch.float32)
    for e, value in enumerate(values):
        if value != values[0]:
            made[e].fill_(value)
    return made
