"""Which backend serves an op on a device and dtype: the one place where that choice is made.

`naive` (plain PyTorch) serves everything; `native` (csrc) and `triton` serve what their op declares with `serves`.
`RLHF_KERNELS_BACKEND=naive|native|triton` asks for one backend; an op that lacks it there falls back to `naive`.
"""

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Backend = Literal["naive", "native", "triton"]
PREFERENCE: tuple[Backend, ...] = ("native", "triton", "naive")

_served: dict[tuple[str, str], set[tuple[str, torch.dtype]]] = {}


def serves(op: str, backend: Backend, devices: Iterable[str], dtypes: Iterable[torch.dtype]) -> None:
    """Declares that `backend` implements `op` on every pair of `devices` and `dtypes`."""
    dtypes = tuple(dtypes)
    _served.setdefault((op, backend), set()).update((device, dtype) for device in devices for dtype in dtypes)


def choose(op: str, tensor: torch.Tensor) -> Backend:
    """The backend that serves `op` on `tensor`'s device and dtype."""
    place = (tensor.device.type, tensor.dtype)
    asked = os.environ.get("RLHF_KERNELS_BACKEND")
    if asked and asked not in PREFERENCE:
        raise ValueError(f"RLHF_KERNELS_BACKEND is {asked!r}; it must be one of {', '.join(PREFERENCE)}")
    for backend in PREFERENCE:
        if backend == "naive" or (asked in (None, "", backend) and place in _served.get((op, backend), ())):
            return backend
    return "naive"


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """A context for an op's body: it chooses its dtypes itself, and autocast's casts of its GEMMs would break it."""
    return torch.autocast(tensor.device.type, enabled=False) if under_autocast(tensor) else nullcontext()


def under_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for `tensor`'s device."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def native_available() -> bool:
    """True when the compiled ops are importable (they then stand under torch.ops.rlhf_kernels)."""
    try:
        import rlhf_kernels._C  # noqa: F401
    except ImportError:
        return False
    return True
