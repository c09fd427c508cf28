"""The op behind `lora_linear` and `lora_linears`: P linears that share x, their adapters, and one backward for all.

torch.library gives it a fake and an autograd formula, so that it compiles in one graph; where nothing needs a gradient
`apply` calls the tier itself. Kept for the backward: x where a dA or dweight needs it, S where a dB does, and of both
the first grad_rows rows only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import naive, tier
from rlhf_kernels.ops.lora.library import triples, widths
from rlhf_kernels.ops.lora.routing import host_runs


def apply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: list[int] | None,
    scaling: list[float],
    scaling_tensor: Tensor | None = None,
    grad_rows: int | None = None,
    order: Tensor | None = None,
) -> list[Tensor]:
    """The op without the checks of arguments: x [rows, K]; P weights and biases; lora_a, lora_b: P * n tensors, entry
    p * n + e; index int [rows] and/or runs (start, end, adapter, ... over all rows); see `tier.Tier` for the rest.

    Under runs alone an adapter no row used gets None as its gradient; under an index it gets zeros.
    """
    if registry.under_autocast(x):
        x, weights, biases = as_autocast(x, weights, biases)
    if runs is None and index is not None and registry.checks_values(index):
        runs = host_runs(index, len(scaling))
    serving = tier.chosen(x, weights, lora_a)
    if serving is None:
        return _naive(x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows)
    learns = torch.is_grad_enabled() and _any_requires_grad(x, weights, biases, lora_a, lora_b)
    if not learns and type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        scaling, scaling_tensor = _on_host(scaling, scaling_tensor)
        return serving.forward(
            x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, 0
        )[0]  # fmt: skip
    grad_rows = x.shape[0] if grad_rows is None else grad_rows
    saved_rows = grad_rows if learns and any(b.requires_grad for b in lora_b) else 0
    if runs is not None and not runs:  # no rows; an empty list is no input torch.library can give a gradient back for
        runs = [0, 0, -1]
    some = [x.new_empty(0) if b is None else b for b in biases]
    ys, _ = _op(
        x, list(weights), some, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, grad_rows, saved_rows
    )
    return ys


def as_autocast(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """x, weights and biases in the dtype that autocast gives torch's own linear; float64 is left alone."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    return cast(x), [cast(w) for w in weights], [None if b is None else cast(b) for b in biases]


def _any_requires_grad(x: Tensor, *lists: Sequence[Tensor | None]) -> bool:
    return x.requires_grad or any(t is not None and t.requires_grad for tensors in lists for t in tensors)


def _on_host(scaling: list[float], scaling_tensor: Tensor | None) -> tuple[list[float], Tensor | None]:
    """A scaling on the CPU as floats."""
    if scaling_tensor is not None and scaling_tensor.device.type == "cpu":
        return scaling_tensor.tolist(), None
    return scaling, scaling_tensor


def _naive(x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows) -> list[Tensor]:
    if index is None:
        counts = torch.tensor([hi - lo for lo, hi, _ in triples(runs)], device=x.device, dtype=torch.long)
        adapters = torch.tensor(runs[2::3], device=x.device, dtype=torch.long)
        index = adapters.repeat_interleave(counts, output_size=x.shape[0])
    n, scales = len(scaling), scaling if scaling_tensor is None else scaling_tensor
    return [
        naive.lora_linear(
            x, weight, bias, lora_a[p * n : p * n + n], lora_b[p * n : p * n + n], index, scales, grad_rows
        )
        for p, (weight, bias) in enumerate(zip(weights, biases))
    ]


# ---- the op: forward, fake, autograd ---------------------------------------------------------------------------------


@torch.library.custom_op("rlhf_kernels::lora_linears", mutates_args=())
def _op(
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
    if runs is None and index is not None and registry.checks_values(index):
        runs = host_runs(index, len(scaling))
    serving = tier.chosen(x, weights, lora_a)
    assert serving is not None
    some = [b if b.numel() else None for b in biases]
    scaling, scaling_tensor = _on_host(scaling, scaling_tensor)
    return serving.forward(
        x, weights, some, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, saved_rows
    )  # fmt: skip


@_op.register_fake
def _(x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, grad_rows, saved_rows):
    s = x.new_empty(saved_rows, sum(widths(lora_a, len(weights))))
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights], s


@torch.library.custom_op("rlhf_kernels::lora_linears_backward", mutates_args=())
def _backward_op(
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
    if runs is None and index is not None and index.device.type == "cpu":
        runs = host_runs(index[:grad_rows], len(scaling))
    serving = tier.chosen(x, weights, lora_a, backward=True)
    assert serving is not None
    scaling, scaling_tensor = _on_host(scaling, scaling_tensor)
    return serving.backward(
        grads, weights, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, x, s, grad_rows, needs
    )


@_backward_op.register_fake
def _(grads, weights, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, x, s, grad_rows, needs):
    present = next(grad for grad in grads if grad.ndim == 2)
    shapes = [(present.shape[0], x.shape[1]), *(w.shape for w in weights), *((w.shape[0],) for w in weights)]
    out = [x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs)]
    for tensor, need in zip((*lora_a, *lora_b), needs[len(shapes) :]):
        out.append(torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else x.new_empty(0))
    return out


def _live_runs(runs: list[int] | None, grad_rows: int) -> list[int] | None:
    """The runs below grad_rows."""
    if runs is None:
        return None
    live: list[int] = []
    for lo, hi, e in triples(runs):
        if lo < grad_rows:
            live += (lo, min(hi, grad_rows), e)
    return live or [0, 0, -1]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, _, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, grad_rows, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.runs = _live_runs(runs, grad_rows)
    ctx.given_runs, ctx.rows = index is None, x.shape[0]
    ctx.scaling, ctx.grad_rows, ctx.count = list(scaling), grad_rows, len(weights)
    ctx.shapes = [w.shape for w in weights]
    tensors = (index if runs is None else None, scaling_tensor, order, x[:grad_rows], output[1])
    ctx.save_for_backward(*tensors, *weights, *lora_a, *lora_b)


def _backward(ctx, grads, _grad_s):
    index, scaling_tensor, order, x, s, *rest = ctx.saved_tensors
    count, n = ctx.count, len(ctx.scaling)
    weights, lora_a, lora_b = rest[:count], rest[count : count + count * n], rest[count + count * n :]
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    used = set(ctx.runs[2::3]) if ctx.given_runs else range(n)
    present = [grad is not None for grad in grads]
    need_w = [need and there for need, there in zip(need_w, present)]
    need_bias = [need and there for need, there in zip(need_bias, present)]
    need_a, need_b = (
        [need and present[i // n] and i % n in used for i, need in enumerate(list(some or []))]
        for some in (need_a, need_b)
    )
    needs = [bool(need) for need in (need_x, *need_w, *need_bias, *need_a, *need_b)]
    some = [x.new_empty(0) if grad is None else grad.contiguous() for grad in grads]
    if not any(present):
        needs = [False] * len(needs)
        out = [None] * len(needs)
    else:
        out = _backward_op(
            some, weights, lora_a, lora_b, index, ctx.runs, ctx.scaling, scaling_tensor, order, x, s, ctx.grad_rows,
            needs,
        )  # fmt: skip
    out = iter([grad if need else None for grad, need in zip(out, needs)])
    take = lambda k: [next(out) for _ in range(k)]  # noqa: E731
    dx, dw, dbias, da, db = next(out), take(count), take(count), take(count * n), take(count * n)
    return dx, dw, dbias, da, db, None, None, None if n else [], None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
