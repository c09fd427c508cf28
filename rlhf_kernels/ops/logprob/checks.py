"""Checks of the log-probability ops' arguments, and of their values where the host may read them."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob.outputs import DIVERGENCES, FIELDS
from rlhf_kernels.ops.lora.routing import check_index
from rlhf_kernels.ops.registry import checks_values


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    divergence: Collection[str],
    entropy: bool,
    grad_fields: Collection[str] | None,
    save: str,
    valid_rows: int | None,
    sharded: bool = False,
) -> tuple[str, ...]:
    """Checks everything but values of tensors; returns the names of the fields asked for."""
    _check_tensors({"hidden": hidden, "weight": weight, "target": target})
    for name, x in (("bias", bias), ("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        if x is not None:
            _check_tensors({name: x})
    if hidden.dim() < 1 or not hidden.is_floating_point():
        raise TypeError(f"hidden must be a floating-point tensor [..., H], got {_describe(hidden)}")
    check_target(target, hidden.shape[:-1], hidden.device, "hidden's leading dimensions")
    width = hidden.shape[-1]
    _check_matrix("weight", weight, hidden, (None, width))
    if sharded and hidden.dtype == torch.float64:
        raise TypeError("hidden is float64; with tp_group it must be float32, bfloat16 or float16")
    if weight.shape[0] == 0 and not sharded:  # a shard's size is checked where all of them are known
        raise ValueError("weight has no rows; the vocabulary must hold at least one token")
    if bias is not None:
        _check_matrix("bias", bias, hidden, (weight.shape[0],))
    check_temperature(temperature, target)
    if softcap is not None and not _is_number(softcap):
        raise TypeError(f"softcap is {softcap!r}; it must be None or a number")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be None or > 0")
    if not _is_number(logit_scale) or not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale is {logit_scale!r}; it must be a finite number other than 0")
    if isinstance(divergence, str) or set(divergence) - set(DIVERGENCES):
        got = divergence if isinstance(divergence, str) else sorted(set(divergence) - set(DIVERGENCES))
        raise ValueError(f"divergence holds {got!r}; it must be a collection of {', '.join(DIVERGENCES)}")
    if ref_hidden is None and (divergence or ref_weight is not None):
        raise ValueError("ref_hidden is None; divergence and ref_weight need the reference's hidden states")
    if ref_hidden is not None:
        _check_matrix("ref_hidden", ref_hidden, hidden, tuple(hidden.shape))
    if ref_weight is not None:
        _check_matrix("ref_weight", ref_weight, hidden, tuple(weight.shape))
    asked = {"logprob", "lse", *divergence, *(("entropy",) if entropy else ())}
    asked |= {"ref_logprob"} if ref_hidden is not None else set()
    if grad_fields is not None and (isinstance(grad_fields, str) or set(grad_fields) - asked):
        got = grad_fields if isinstance(grad_fields, str) else sorted(set(grad_fields) - asked)
        raise ValueError(f"grad_fields holds {got!r}; it must be a collection of fields asked for: {sorted(asked)}")
    if save not in ("auto", "grad_vector", "recompute", "logits"):
        raise ValueError(f"save is {save!r}; it must be auto, grad_vector, recompute or logits")
    if valid_rows is not None and not 0 <= valid_rows <= target.numel():
        raise ValueError(f"valid_rows is {valid_rows}; it must lie in [0, {target.numel()}], the number of targets")
    return tuple(name for name in FIELDS if name in asked)


def check_values(
    target: Tensor,
    vocabulary: int,
    temperature: float | Tensor,
    ignore_index: int | None,
    index: Tensor | None = None,
    adapters: int = 0,
) -> None:
    """What `checks_values` allows to be read. ignore_index None: `target` holds no ignored row."""
    if not checks_values(target):
        return
    counted = target if ignore_index is None else target[target != ignore_index]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= vocabulary):
        bad = int(counted[(counted < 0) | (counted >= vocabulary)][0])
        raise IndexError(f"target holds {bad}; it must lie in [0, {vocabulary}) or equal ignore_index")
    if isinstance(temperature, Tensor) and temperature.numel() and not bool((temperature > 0).all()):
        raise ValueError(f"temperature holds {float(temperature.min())}; it must be > 0")
    if index is not None:
        check_index(index, adapters)


def check_target(target: Tensor, shape: torch.Size, device: torch.device, what: str) -> None:
    _check_tensors({"target": target})
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target has dtype {target.dtype}; it must be int32 or int64")
    if target.shape != shape:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be {what}, {tuple(shape)}")
    if target.device != device:
        raise ValueError(f"target is on {target.device}; it must be on {device}")


def check_temperature(temperature: float | Tensor, target: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        if not _is_number(temperature):
            raise TypeError(f"temperature is {temperature!r}; it must be a number or a tensor")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be > 0")
        return
    fits = temperature.dim() <= target.dim() and all(
        t in (1, n) for t, n in zip(reversed(temperature.shape), reversed(target.shape))
    )
    if not fits or temperature.device != target.device:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}; "
            f"it must broadcast to target's {tuple(target.shape)} on {target.device}"
        )


def _check_matrix(name: str, x: Tensor, hidden: Tensor, shape: tuple[int | None, ...]) -> None:
    if x.dim() != len(shape) or any(want is not None and got != want for got, want in zip(x.shape, shape)):
        wanted = ", ".join("V" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{wanted}]")
    if not x.is_floating_point() or (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(f"{name} has dtype {x.dtype}; hidden has {hidden.dtype} (only half and single dtypes may mix)")
    if x.device != hidden.device:
        raise ValueError(f"{name} is on {x.device}; it must be on hidden's {hidden.device}")


def check_lora(lora: tuple, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple:
    """lora with A and B made 3-D."""
    if not isinstance(lora, (tuple, list)) or len(lora) != 4:
        got = f"has {len(lora)} entries" if isinstance(lora, (tuple, list)) else f"is a {type(lora).__name__}"
        raise ValueError(f"lora {got}; it must be (A, B, adapter_index, scaling)")
    a, b, index, scaling = lora
    _check_tensors({"lora A": a, "lora B": b})
    if a.dim() == 2 and b.dim() == 2:
        a, b = a[None], b[None]
    rank = a.shape[1] if a.dim() == 3 else -1
    _check_matrix("lora A", a, hidden, (a.shape[0], rank, hidden.shape[-1]))
    _check_matrix("lora B", b, hidden, (a.shape[0], weight.shape[0], rank))
    if isinstance(index, Tensor):
        if index.shape != target.shape or index.is_floating_point():
            raise ValueError(
                f"lora: adapter_index is {index.dtype} {tuple(index.shape)}; it must be int {tuple(target.shape)}"
            )
    elif index is None:
        if a.shape[0] != 1:
            raise ValueError(f"lora: adapter_index is None with {a.shape[0]} adapters; it must be given when n > 1")
    elif not -1 <= index < a.shape[0]:
        raise IndexError(f"lora: adapter_index is {index}; it must lie in [-1, {a.shape[0]})")
    if isinstance(scaling, Tensor) and scaling.numel() not in (1, a.shape[0]):
        raise ValueError(f"lora: scaling has {scaling.numel()} entries; it must be a float or one for each adapter")
    return a, b, index, scaling


def _check_tensors(named: dict[str, object]) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
