"""`gae`: generalised advantage estimation over padded rows or over sequences laid end to end."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.advantage import native


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token.

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

    Args:
        rewards, values: floats, [B, T]; or flat [N], all sequences end to end, with `lengths`. Computed in fp64 where
            one of them is fp64, in fp32 otherwise.
        mask: bool (or 0/1 integers) of the same shape. A masked token does not exist, at the end of a row or inside it:
            its neighbours follow one another, what it holds (NaN too) is not read, its advantage and return are 0.
        lengths: int [B] with sum N, for flat input only.
        gamma, lam: in [0, 1].
        last_value: float [B], the value after each sequence's last valid token, for sequences cut short; None: 0.

    Returns:
        (advantages, returns), fp32 or fp64, shaped as rewards. Differentiable in rewards, values and last_value;
        callers that train on the advantages detach them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, by the argument's name.

    Source: Schulman et al., "High-dimensional continuous control using generalized advantage estimation", 2016, eq. 16.
    """
    for name, x in (("rewards", rewards), ("values", values)):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(x)}")
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise TypeError(f"{name} must be a number, got {factor!r}")
        if not 0.0 <= factor <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {factor}")
    _same_shape("values", values, rewards)
    starts = _starts(rewards, lengths)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise TypeError(f"mask must be a bool or integer tensor, got {_kind(mask)}")
        _same_shape("mask", mask, rewards)
        mask = mask.bool()
    sequences = starts.numel() - 1
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    if last_value is None:
        last = rewards.new_zeros(sequences, dtype=dtype)
    else:
        if not isinstance(last_value, Tensor) or not last_value.dtype.is_floating_point:
            raise TypeError(f"last_value must be a floating-point tensor, got {_kind(last_value)}")
        if last_value.shape != (sequences,) or last_value.device != rewards.device:
            got = f"{tuple(last_value.shape)} on {last_value.device}"
            raise ValueError(f"last_value must have shape ({sequences},) on {rewards.device}, got {got}")
        last = last_value.to(dtype).contiguous()

    flat_mask = None if mask is None else mask.reshape(-1).contiguous()
    r, v = (x.to(dtype).reshape(-1).contiguous() for x in (rewards, values))
    advantages, returns = _gae(r, v, flat_mask, starts, last, float(gamma), float(lam))
    return advantages.view(rewards.shape), returns.view(rewards.shape)


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _same_shape(name: str, x: Tensor, rewards: Tensor) -> None:
    if x.shape != rewards.shape:
        raise ValueError(f"{name} must have rewards' shape {tuple(rewards.shape)}, got {tuple(x.shape)}")
    if x.device != rewards.device:
        raise ValueError(f"{name} is on {x.device}, rewards on {rewards.device}: they must share a device")


def _starts(rewards: Tensor, lengths: Tensor | None) -> Tensor:
    """int64 [B + 1]: where each sequence begins in the flat tensor."""
    if lengths is None:
        if rewards.dim() != 2:
            raise ValueError(f"rewards must be [B, T], or flat with lengths, got shape {tuple(rewards.shape)}")
        return torch.arange(rewards.shape[0] + 1, device=rewards.device) * rewards.shape[1]
    if rewards.dim() != 1:
        raise ValueError(f"rewards must be flat where lengths is given, got shape {tuple(rewards.shape)}")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
    ):
        raise TypeError(f"lengths must be an integer tensor, got {_kind(lengths)}")
    if lengths.dim() != 1 or lengths.device != rewards.device:
        got = f"shape {tuple(lengths.shape)} on {lengths.device}"
        raise ValueError(f"lengths must be [B] on {rewards.device}, got {got}")
    starts = lengths.new_zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=starts[1:])
    return starts


def _check_starts(starts: Tensor, size: int) -> None:
    lengths = starts.diff()
    if bool((lengths < 0).any()):
        raise ValueError(f"lengths must be >= 0, got {int(lengths.min())}")
    if int(starts[-1]) != size:
        raise ValueError(f"lengths must sum to the number of tokens, {size}, got {int(starts[-1])}")


@torch.library.custom_op("rlhf_kernels::gae", mutates_args=())
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    starts: Tensor,
    last_value: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    if registry.checks_values(rewards):
        _check_starts(starts, rewards.numel())
    return native.scans(rewards).gae(rewards, values, mask, starts, last_value, gamma, lam)


@_gae.register_fake
def _(rewards: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


@torch.library.custom_op("rlhf_kernels::gae_backward", mutates_args=())
def _gae_backward(
    grad: Tensor, mask: Tensor | None, starts: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor, Tensor]:
    return native.scans(grad).gae_backward(grad.contiguous(), mask, starts, gamma, lam)


@_gae_backward.register_fake
def _(grad: Tensor, mask: Tensor | None, starts: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    like = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like), grad.new_empty(starts.shape[0] - 1)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, _, mask, starts, _, ctx.gamma, ctx.lam = inputs
    ctx.save_for_backward(mask, starts)


def _backward(ctx: Any, grad_advantages: Tensor, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
    mask, starts = ctx.saved_tensors
    grad = grad_advantages + grad_returns  # returns are advantages + values
    grad_rewards, grad_values, grad_last = _gae_backward(grad, mask, starts, ctx.gamma, ctx.lam)
    direct = grad_returns if mask is None else torch.where(mask, grad_returns, 0.0)
    return grad_rewards, grad_values + direct, None, None, grad_last, None, None


_gae.register_autograd(_backward, setup_context=_setup_context)
