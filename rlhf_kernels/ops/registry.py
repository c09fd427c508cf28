"""Which backend serves an op on a device and dtype: the one place where that choice is made.

`naive` (plain PyTorch) serves everything; `native` (csrc) and `triton` serve what their op declares with `serves`.
`RLHF_KERNELS_BACKEND=naive|native|triton` asks for one backend; an op that lacks it there falls back to `naive`.
"""

import importlib.util
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch

Backend = Literal["naive", "native", "triton"]
PREFERENCE: tuple[Backend, ...] = ("native", "triton", "naive")

ABI = 5  # of the compiled ops; rises with every change of a schema or of its meaning, here and in csrc/schema.cpp

_served: dict[tuple[str, str], set[tuple[str, torch.dtype]]] = {}


def serves(op: str, backend: Backend, devices: Iterable[str], dtypes: Iterable[torch.dtype]) -> None:
    """Declares that `backend` implements `op` on every pair of `devices` and `dtypes`."""
    dtypes = tuple(dtypes)
    _served.setdefault((op, backend), set()).update((device, dtype) for device in devices for dtype in dtypes)


def choose(op: str, tensor: torch.Tensor) -> Backend:
    """The backend that serves `op` on `tensor`'s device and dtype."""
    return chosen(op, tensor.device.type, tensor.dtype)


def chosen(op: str, device: str, dtype: torch.dtype) -> Backend:
    """The same for a kind of device and a dtype."""
    place, one = (device, dtype), asked()
    for backend in PREFERENCE:
        if backend == "naive" or (one in (None, backend) and place in _served.get((op, backend), ())):
            return backend
    return "naive"


def asked() -> Backend | None:
    """The backend that RLHF_KERNELS_BACKEND asks for, if any."""
    name = os.environ.get("RLHF_KERNELS_BACKEND")
    if not name:
        return None
    if name not in PREFERENCE:
        raise ValueError(f"RLHF_KERNELS_BACKEND is {name!r}; it must be one of {', '.join(PREFERENCE)}")
    return cast(Backend, name)


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether values are checked, which makes the host read them: on the CPU, elsewhere with RLHF_KERNELS_CHECK=1.

    Never while torch.compile traces: there are no values then.
    """
    here = tensor.is_cpu or os.environ.get("RLHF_KERNELS_CHECK") == "1"
    return here and not torch.compiler.is_compiling()


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager:
    """A context for an op's body: it chooses its dtypes itself, and autocast's casts of its GEMMs would break it."""
    return torch.autocast(tensor.device.type, enabled=False) if under_autocast(tensor) else nullcontext()


def under_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for `tensor`'s device."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def triton_devices() -> tuple[str, ...]:
    """Kinds of devices on which Triton kernels run: GPUs, and the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return ()
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def native_devices(op: str) -> tuple[str, ...]:
    """Kinds of devices for which the compiled `op` was built."""
    if not native_available():
        return ()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(kind for kind, key in (("cpu", "CPU"), ("cuda", "CUDA")) if has(f"rlhf_kernels::{op}", key))


def native_available() -> bool:
    """True when the compiled ops are there; this loads them, and they then stand under torch.ops.rlhf_kernels.

    ImportError where they were compiled from other sources than this Python code: schemas that differ would go wrong
    at some call, or in silence.
    """
    try:
        from rlhf_kernels import _C
    except ImportError:
        return False
    built = getattr(_C, "ABI", None)
    if built != ABI:
        raise ImportError(
            f"rlhf_kernels._C is stale: it has ABI {built}, this Python code needs {ABI}; "
            "rebuild it with `pip install --no-build-isolation --no-deps -e .`"
        )
    return True
