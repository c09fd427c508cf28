"""Which adapter each row uses: a tensor of the batch, or, where the host knows it, the list of contiguous runs.

Rows of one adapter usually lie together (one role after another), so a batch is a few runs `(start, end, adapter)`; a
run is a slice, and a slice of a GEMM's output can be accumulated in place without gathering a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_kernels.ops.registry import checks_values

MANY_ADAPTERS = 8  # above it a device's rows are taken by adapter rather than each row past every adapter
SHORT_INDEX = 64  # entries up to which a Python loop finds the runs faster than tensor ops do


@dataclass(frozen=True)
class Routing:
    """Made once a batch by `build_routing` (or `Routing.from_runs`), shared by all layers."""

    adapters: int  # n, the number of adapter slots the index refers to
    rows: int  # entries of the index; a layer may have a multiple of it as rows (an index [B] for x [B, T, K])
    index: Tensor | None = None  # int [rows], the caller's own tensor: overwriting it in place re-routes, at once
    runs: tuple[int, ...] | None = None  # instead of an index: start, end, adapter, start, ... over all rows; -1 bypass
    grad_rows: int | None = None  # only the first grad_rows entries need gradients
    order: Tensor | None = None  # int64 [rows], sorted by adapter on the device; a stale one costs speed only
    # what host_runs saw last, and made of it
    _seen: list[tuple[Tensor, list[int] | None]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[int, int, int]], adapters: int, grad_rows: int | None = None) -> "Routing":
        """From runs known on the host, in order and without gaps: no tensor at all, so no synchronisation either."""
        flat: list[int] = []
        for start, end, adapter in runs:
            if start != (flat[-2] if flat else 0) or end < start or not -1 <= adapter < adapters:
                raise ValueError(f"runs: ({start}, {end}, {adapter}) leaves a gap or names no adapter of {adapters}")
            flat += (start, end, adapter)
        return cls(adapters, flat[-2] if flat else 0, runs=tuple(flat), grad_rows=grad_rows)

    def host_runs(self) -> list[int] | None:
        """The runs as of now, where the host may know them: not of a device's index, nor while torch.compile traces."""
        if self.runs is not None:
            return list(self.runs)
        index = self.index
        if index is None or not index.is_cpu or torch.compiler.is_compiling():
            return None
        if not self._seen or not torch.equal(self._seen[0][0], index):  # a version counter would miss numpy and .data
            self._seen[:] = [(index.clone(), host_runs(index, self.adapters))]
        return self._seen[0][1]


def build_routing(adapter_index: Tensor, n: int) -> Routing:
    """The routing of an int tensor of adapters (-1: bypass) over `n` adapter slots.

    The tensor itself is kept: overwritten in place, it re-routes the next call (and a replayed CUDA graph). One that
    cannot be flattened without a copy (expanded, transposed) is copied, and its later values are not seen. On the CPU
    the index is checked (IndexError outside [-1, n)), now and in every call; on other devices it is taken as it is,
    with no synchronisation, unless RLHF_KERNELS_CHECK=1.
    """
    if not isinstance(adapter_index, Tensor) or not is_index(adapter_index):
        kind = adapter_index.dtype if isinstance(adapter_index, Tensor) else type(adapter_index).__name__
        raise TypeError(f"adapter_index is {kind}; it must be an int tensor")
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n is {n!r}; it must be the number of adapters, an int >= 0")
    index = adapter_index.reshape(-1)
    if checks_values(index):
        check_index(index, n)
    sorts = index.device.type != "cpu" and n > MANY_ADAPTERS
    return Routing(n, index.numel(), index=index, order=index.argsort(stable=True) if sorts else None)


def triples(runs: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(start, end, adapter) of every run."""
    return zip(runs[0::3], runs[1::3], runs[2::3])


def repeated(runs: Sequence[int], repeats: int) -> list[int]:
    """The runs where every entry stands for `repeats` rows."""
    return [v if i % 3 == 2 else v * repeats for i, v in enumerate(runs)]


def used_alone(runs: Sequence[int]) -> tuple[list[int], list[int]]:
    """The adapters that rows use, ascending, and the runs over these alone."""
    used = sorted({e for e in runs[2::3] if e >= 0})
    place = {e: i for i, e in enumerate(used)} | {-1: -1}
    return used, [place[v] if i % 3 == 2 else v for i, v in enumerate(runs)]


def is_index(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


def check_index(index: Tensor, n: int) -> None:
    if index.numel():
        low, high = (int(v) for v in index.aminmax())
        _check_range(low, high, n)


def _check_range(low: int, high: int, n: int) -> None:
    if low < -1 or high >= n:
        raise IndexError(
            f"adapter_index holds {low if low < -1 else high}; with {n} adapters it must lie in [-1, {n - 1}]"
        )


def host_runs(index: Tensor, n: int) -> list[int] | None:
    """The runs of a CPU index, checked; None where rows are so scattered that gathering by adapter is the better way.

    An index elsewhere is only checked: it has no runs, as in a call that does not look.
    """
    rows = index.numel()
    if rows == 0:
        return []
    if not index.is_cpu:
        check_index(index, n)
        return None
    runs: list[int] = []
    start = 0
    if rows <= SHORT_INDEX:
        entries = index.tolist()
        last = entries[0]
        for row, e in enumerate(entries):
            if e != last:
                runs += (start, row, last)
                start, last = row, e
        runs += (start, rows, last)
    else:
        adapters, counts = torch.unique_consecutive(index, return_counts=True)
        if len(adapters) > max(8, 4 * n):
            check_index(adapters, n)
            return None
        for e, count in zip(adapters.tolist(), counts.tolist()):
            runs += (start, start + count, e)
            start += count
    found = runs[2::3]
    _check_range(min(found), max(found), n)
    return runs if len(found) <= max(8, 4 * n) else None
