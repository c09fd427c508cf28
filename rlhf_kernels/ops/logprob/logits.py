"""`logprob` for callers that already hold logits: one read of them forward, one read and one write backward."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob import naive, native
from rlhf_kernels.ops.logprob.checks import check_target, check_temperature, check_values
from rlhf_kernels.ops.logprob.outputs import LogprobOutput


def logprob(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> LogprobOutput:
    """log softmax(logits / temperature)[target], the logsumexp and, if asked for, the entropy (nats) of every row.

    Args:
        logits: [..., V], fp32, bf16, fp16 (float64 goes through the plain formula); the sums are fp32 or wider.
        target: int32 or int64 [...].
        temperature: > 0, a float or a tensor that broadcasts to target's shape.
        ignore_index: rows with this target are exactly 0 in every output and gradient.
        entropy: also return the entropy; both it and logprob carry gradient.
        inplace_backward: backward overwrites the logits' storage with their gradient (no second [..., V] buffer);
            nobody may need the logits afterwards. No effect on rows that are not contiguous, or under torch.compile.

    Returns:
        LogprobOutput(logprob, lse, entropy), fp32 in target's shape.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, temperature <= 0. IndexError: a target out of range
            (tensors' values on the CPU, elsewhere with RLHF_KERNELS_CHECK=1).

    Source: log-softmax, as in `linear_logprob`.
    """
    if logits.dim() < 1 or not logits.is_floating_point() or logits.shape[-1] == 0:
        raise TypeError(f"logits must be a floating-point tensor [..., V], got {logits.dtype} {tuple(logits.shape)}")
    check_target(target, logits.shape[:-1], logits.device, "logits' leading dimensions")
    check_temperature(temperature, target)
    if registry.choose("logprob", logits) == "naive":
        check_values(target, logits.shape[-1], temperature, ignore_index)
        found = naive.logprob(logits, target, temperature=temperature, ignore_index=ignore_index, entropy=entropy)
        wide = None if found.entropy is None else found.entropy.float()
        return LogprobOutput(found.logprob.float(), found.lse.float(), wide)
    flat = logits.reshape(target.numel(), logits.shape[-1])
    if isinstance(temperature, Tensor):
        t = temperature.detach().broadcast_to(target.shape).reshape(-1).to(torch.float32).contiguous()
    else:
        t = torch.full((flat.shape[0],), float(temperature), dtype=torch.float32, device=logits.device)
    overwrite = inplace_backward and flat.is_contiguous() and not torch.compiler.is_compiling()
    fields, _ = forward(flat, target.reshape(-1).long().contiguous(), t, ignore_index, overwrite)
    shaped = [f.reshape(target.shape) for f in fields.unbind(0)]
    return LogprobOutput(shaped[0], shaped[1], shaped[2] if entropy else None)


@torch.library.custom_op("rlhf_kernels::logprob", mutates_args=())
def forward(
    logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """fields [3, N] (logprob, lse, entropy) and [2, N]: 1 - p_target, what lse lost by rounding."""
    check_values(target, logits.shape[1], temperature, ignore_index)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(5, len(target), dtype=torch.float32, device=logits.device)
    native.logprob_rows(logits, target, temperature, ignore_index, out)
    return out[:3].clone(), out[3:].clone()


@forward.register_fake
def _(logits, target, temperature, ignore_index, overwrite):
    rows = target.shape[0]
    return logits.new_empty((3, rows), dtype=torch.float32), logits.new_empty((2, rows), dtype=torch.float32)


@torch.library.custom_op("rlhf_kernels::logprob_backward", mutates_args=())
def backward(logits: Tensor, target: Tensor, temperature: Tensor, ignore_index: int, coefficients: Tensor) -> Tensor:
    """The gradient of logits [N, V], in their dtype; coefficients [6, N] as in csrc."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    native.logprob_rows_backward(logits, target, temperature, ignore_index, coefficients, out)
    return out


@backward.register_fake
def _(logits, target, temperature, ignore_index, coefficients):
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, target, temperature, ignore_index, overwrite = inputs
    fields, rest = output
    ctx.save_for_backward(logits, target, temperature, fields, rest)
    ctx.ignore_index, ctx.overwrite = ignore_index, overwrite
    ctx.mark_non_differentiable(rest)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
    logits, target, temperature, fields, (miss, low) = ctx.saved_tensors
    g_logprob, g_lse, g_entropy = grad.unbind(0)
    constant = g_lse - g_logprob - g_entropy * fields[2]
    coefficients = torch.stack((fields[1], low, constant, -g_entropy, g_logprob, g_logprob * miss))
    if ctx.overwrite:
        storage = logits.detach()
        native.logprob_rows_backward(storage, target, temperature, ctx.ignore_index, coefficients, storage)
        return storage, None, None, None, None
    return backward(logits, target, temperature, ctx.ignore_index, coefficients), None, None, None, None


forward.register_autograd(_backward, setup_context=_setup_context)
