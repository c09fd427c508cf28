"""`masked_whiten`: zero mean, unit variance over the valid entries, of one tensor or of a process group's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.ops import registry

registry.serves(
    "masked_whiten",
    "triton",
    registry.triton_devices(),
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
)

EPSILON = 1e-8  # added to the variance, as in lm-human-preferences and TRL


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the valid entries; with shift_mean=False the mean is added again.

    var is the population variance (divided by n), as in lm-human-preferences; TRL and verl divide by n - 1.

    Args:
        x: float tensor of any shape. Statistics are fp64.
        mask: bool (or 0/1 integers) of x's shape; masked entries are not read (NaN does no harm) and come back 0.
        group: a process group whose members' entries are whitened together (every member must call, an empty x is
            fine): two all-reduces of sums. The statistics are then constants to autograd, so x must not require grad.

    Returns:
        Tensor like x (half types as fp32). One valid entry has variance 0: it comes back 0, or itself with
        shift_mean=False; no valid entry gives zeros. Differentiable in x, through mean and variance, without a group.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, by the argument's name.

    Source: `whiten` of lm-human-preferences (Ziegler et al., 2019).
    """
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(
            f"x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    elif not isinstance(mask, Tensor) or mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be a bool or integer tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.shape != x.shape or mask.device != x.device:
        got = f"{tuple(mask.shape)} on {mask.device}"
        raise ValueError(f"mask must have x's shape {tuple(x.shape)} on {x.device}, got {got}")
    if group is not None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires grad, but gradients do not cross processes: pass x.detach(), or no group")
    mask = mask.bool()
    graph = x.requires_grad and torch.is_grad_enabled()
    moments = _masked_moments(_wide(x) if graph else x, mask)
    if group is not None:
        moments = _joint(moments, group)
    return _whiten(_wide(x), mask, moments, shift_mean) if graph else _whitened(x, mask, moments, shift_mean)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _joint(moments: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The moments of all members' entries together."""
    count, mean, deviations = moments.unbind()
    sums = torch.stack([count, count * mean])
    dist.all_reduce(sums, group=group)
    total, joint = sums[0], sums[1] / sums[0].clamp(min=1.0)
    deviations = deviations + count * (mean - joint) ** 2  # the sum of squares about the joint mean
    dist.all_reduce(deviations, group=group)
    return torch.stack([total, joint, deviations])


def _whiten(wide: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    count, mean, deviations = moments.unbind()
    scale = (deviations / count.clamp(min=1.0) + EPSILON).rsqrt()
    centred = (torch.where(mask, wide, 0.0) - mean) * scale
    out = centred if shift_mean else centred + mean
    return torch.where(mask, out, 0.0).to(wide.dtype)


def _by_triton(x: Tensor) -> bool:
    return registry.choose("masked_whiten", x) == "triton"


@torch.library.custom_op("rlhf_kernels::whitened", mutates_args=())
def _whitened(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    """What needs no gradient, in one launch where there is a kernel."""
    if _by_triton(x):
        from rlhf_kernels.ops.advantage import triton_whiten

        return triton_whiten.whiten(x, mask, moments, EPSILON, shift_mean)
    return _whiten(_wide(x), mask, moments, shift_mean)


@_whitened.register_fake
def _(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    return torch.empty(x.shape, dtype=_wide(x).dtype, device=x.device)


@torch.library.custom_op("rlhf_kernels::masked_moments", mutates_args=())
def _masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """fp64 [3]: how many entries are valid, their mean (0 if none), their sum of squared deviations from it."""
    if _by_triton(x):
        from rlhf_kernels.ops.advantage import triton_whiten

        return triton_whiten.moments(x, mask)
    valid = torch.where(mask, x, 0.0).double()
    count = mask.sum().double()
    mean = valid.sum() / count.clamp(min=1.0)
    deviations = torch.where(mask, valid - mean, 0.0).square().sum()
    return torch.stack([count, mean, deviations])


@_masked_moments.register_fake
def _(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    x, mask, moments = ctx.saved_tensors
    count, mean, _ = moments.unbind()
    grad_x = grad[1] / count.clamp(min=1.0) + 2.0 * grad[2] * (torch.where(mask, x, 0.0).double() - mean)
    return torch.where(mask, grad_x, 0.0).to(x.dtype), None


_masked_moments.register_autograd(_backward, setup_context=_setup_context)
