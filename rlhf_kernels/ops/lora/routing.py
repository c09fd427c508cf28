"""Which adapter each row uses: a tensor of the batch, and on the host, where it is known, the list of contiguous runs.

Rows of one adapter usually lie together (one role after another), so a batch is a few runs `(start, end, adapter)`; a
run is a slice, and a slice of a GEMM's output can be accumulated in place without gathering a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels.ops.registry import checks_values


@dataclass(frozen=True)
class Routing:
    """Made once a batch by `build_routing` (or `Routing.from_runs`), shared by all layers."""

    adapters: int  # n, the number of adapter slots the index refers to
    rows: int  # entries of the index; a layer may have a multiple of it as rows (an index [B] for x [B, T, K])
    index: Tensor | None = None  # int [rows], the caller's own tensor: overwriting it in place re-routes (CUDA graphs)
    runs: tuple[int, ...] | None = None  # start, end, adapter, start, end, adapter, ... over [0, rows); -1 is bypass
    grad_rows: int | None = None  # only the first grad_rows entries need gradients

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[int, int, int]], adapters: int, grad_rows: int | None = None) -> "Routing":
        """From runs known on the host, in order and without gaps: no tensor at all, so no synchronisation either."""
        flat: list[int] = []
        for start, end, adapter in runs:
            if start != (flat[-2] if flat else 0) or end < start or not -1 <= adapter < adapters:
                raise ValueError(f"runs: ({start}, {end}, {adapter}) leaves a gap or names no adapter of {adapters}")
            flat += (start, end, adapter)
        return cls(adapters, flat[-2] if flat else 0, runs=tuple(flat), grad_rows=grad_rows)


def build_routing(adapter_index: Tensor, n: int) -> Routing:
    """The routing of an int tensor of adapters (-1: bypass) over `n` adapter slots.

    On the CPU the index is checked (IndexError outside [-1, n)) and cut into contiguous runs; on other devices it is
    taken as it is, with no synchronisation, unless RLHF_KERNELS_CHECK=1.
    """
    if not isinstance(adapter_index, Tensor) or adapter_index.is_floating_point() or adapter_index.dtype == torch.bool:
        kind = adapter_index.dtype if isinstance(adapter_index, Tensor) else type(adapter_index).__name__
        raise TypeError(f"adapter_index is {kind}; it must be an int tensor")
    if not isinstance(n, int) or n < 0:
        raise ValueError(f"n is {n!r}; it must be the number of adapters, an int >= 0")
    index = adapter_index.reshape(-1)
    if checks_values(index):
        check_index(index, n)
    runs = contiguous_runs(index, n) if index.device.type == "cpu" else None
    return Routing(n, index.numel(), index=index, runs=runs)


def check_index(index: Tensor, n: int) -> None:
    if index.numel():
        low, high = (int(v) for v in index.aminmax())
        if low < -1 or high >= n:
            raise IndexError(
                f"adapter_index holds {low if low < -1 else high}; with {n} adapters it must lie in [-1, {n - 1}]"
            )


def contiguous_runs(index: Tensor, n: int) -> tuple[int, ...] | None:
    """The runs of a CPU index, or None where rows are so scattered that gathering by adapter is the better way."""
    if index.numel() == 0:
        return ()
    adapters, counts = torch.unique_consecutive(index, return_counts=True)
    if len(adapters) > max(8, 4 * n):
        return None
    flat: list[int] = []
    for adapter, count in zip(adapters.tolist(), counts.tolist()):
        start = flat[-2] if flat else 0
        flat += (start, start + count, adapter)
    return tuple(flat)
