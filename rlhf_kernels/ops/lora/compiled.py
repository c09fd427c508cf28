"""`lora_linears` for torch.compile: a custom op and its backward, each with a fake: one node each of a graph."""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.lora import gradients
from rlhf_kernels.ops.lora.gradients import Call, checked_runs, on_host, parts
from rlhf_kernels.ops.lora.library import widths


@torch.library.custom_op("rlhf_kernels::lora_linears", mutates_args=())
def op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: list[int] | None,
    scaling: list[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    grad_rows: int,
    saved_rows: int,
) -> tuple[list[Tensor], Tensor]:
    """An empty bias stands for none."""
    if runs is None and index is not None:
        runs = checked_runs(index, len(scaling))
    some = [b if b.numel() else None for b in biases]
    scales, scaling_tensor = on_host(scaling, scaling_tensor)
    return gradients.forward(x, weights, some, lora_a, lora_b, index, runs, scales, scaling_tensor, order, saved_rows)


@op.register_fake
def _(x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, grad_rows, saved_rows):
    s = x.new_empty(saved_rows, sum(widths(lora_a, len(weights))))
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights], s


@torch.library.custom_op("rlhf_kernels::lora_linears_backward", mutates_args=())
def backward_op(
    grads: list[Tensor],
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: list[int] | None,
    scaling: list[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    x: Tensor,
    s: Tensor,
    grad_rows: int,
    needs: list[bool],
) -> list[Tensor]:
    return gradients.backward(
        grads, weights, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, x, s, grad_rows, needs
    )


@backward_op.register_fake
def _(grads, weights, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, x, s, grad_rows, needs):
    rows = next(grad.shape[0] for grad in grads if grad.ndim == 2)
    shapes = [(rows, x.shape[1]), *(w.shape for w in weights), *((w.shape[0],) for w in weights)]
    shapes += [t.shape for t in (*lora_a, *lora_b)]
    likes = [x] * (1 + 2 * len(weights)) + [*lora_a, *lora_b]
    return [like.new_empty(shape if need else 0) for like, shape, need in zip(likes, shapes, needs)]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, _, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, grad_rows, saved_rows = inputs
    call = Call(runs, list(scaling), grad_rows, saved_rows, len(weights), index is None)
    ctx.none_runs = [] if runs is not None and not runs else None
    gradients.keep(ctx, call, index, scaling_tensor, order, x, weights, lora_a, lora_b, output[1])


def _backward(ctx: Any, grads: Any, _grad_s: Any) -> tuple:
    needs = [ctx.needs_input_grad[0], *(need for some in ctx.needs_input_grad[1:5] for need in some or ())]
    dx, *rest = gradients.gradients(ctx, grads, needs, backward_op)
    lists = [list(part) for part in parts(ctx.call, rest)]
    # an empty list has no gradient but an empty list
    return dx, *lists, None, ctx.none_runs, None if ctx.call.scaling else [], None, None, None, None


op.register_autograd(_backward, setup_context=_setup_context)
backward_op.register_autograd(gradients.no_second)
