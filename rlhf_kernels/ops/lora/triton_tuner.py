"""Fused or split: whether our GEMM adds the adapters itself, or the library's GEMM adds to what they give.

RLHF_KERNELS_LORA=fused|split decides for all; else each class of shapes is measured once a process, on the device and
the tensors of its first call, which waits for it. Where that may not be (graph capture, deterministic algorithms asked
for, few rows, the interpreter) a rule decides: fused for shallow products. There the pass over the output that it saves
is more than what our GEMM loses to the library's; an estimate, not measured.
"""

import os
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Literal, cast

import torch
from torch import Tensor

Way = Literal["fused", "split"]
SHALLOW = 2048  # the depth at which 2 bytes an output element at 4.3 TB/s are 7 % of its multiplications at 720 TFLOP/s
FEW_ROWS = 256  # below, launches and not passes decide
ROUNDS = 5

_measured: dict[Hashable, Way] = {}


def asked() -> Way | None:
    """What RLHF_KERNELS_LORA asks for."""
    name = os.environ.get("RLHF_KERNELS_LORA")
    if name not in (None, "", "fused", "split"):
        raise ValueError(f"RLHF_KERNELS_LORA is {name!r}; it must be fused or split")
    return cast(Way, name) if name else None


def run(shape: Hashable, sample: Tensor, rows: int, depth: int, ways: Mapping[Way, Callable[[], None]]) -> None:
    """Runs one of `ways`, each of which writes the same result. shape: what else sets its class apart; sample: a tensor
    of the call; depth: features summed over."""
    if len(ways) == 1:
        (only,) = ways.values()
        return only()
    way = asked() or _chosen((shape, (rows - 1).bit_length(), sample.dtype, sample.device), sample, rows, depth, ways)
    return ways[way]()


def by_rule(rows: int, depth: int) -> Way:
    return "fused" if rows >= FEW_ROWS and depth <= SHALLOW else "split"


def _chosen(
    key: Hashable, sample: Tensor, rows: int, depth: int, ways: Mapping[Way, Callable[[], None]]
) -> Way:  # fmt: skip
    if key in _measured:
        return _measured[key]
    if rows < FEW_ROWS or not _may_measure(sample):
        return by_rule(rows, depth)
    times = {way: _milliseconds(call) for way, call in ways.items()}
    _measured[key] = min(times, key=times.__getitem__)
    return _measured[key]


def _may_measure(sample: Tensor) -> bool:
    if not sample.is_cuda or torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _milliseconds(call: Callable[[], None]) -> float:
    """The median time on the device, after a first call that compiles and warms up."""
    call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for start, stop in pairs:
        start.record()
        call()
        stop.record()
    pairs[-1][1].synchronize()
    return median(start.elapsed_time(stop) for start, stop in pairs)
