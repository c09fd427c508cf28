"""The op behind `lora_linear` and `lora_linears`: P linears that share x, their adapters, and one backward for all.

Where nothing needs a gradient `apply` calls the tier itself; else it is one autograd node, and under torch.compile one
custom op (`compiled`). What a node keeps and computes is in `gradients`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import compiled, gradients, naive, tier
from rlhf_kernels.ops.lora.gradients import Call, checked_runs, on_host, parts
from rlhf_kernels.ops.lora.routing import triples


def apply(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None = None,
    grad_rows: int | None = None,
    order: Tensor | None = None,
) -> list[Tensor]:
    """The op without the checks of arguments, for modules.

    x [rows, K]; P weights [N_p, K] and biases; lora_a, lora_b: P * n tensors, entry p * n + e, [r, K] and [N_p, r],
    r = 0 where a projection lacks an adapter; index int [rows] and/or runs (start, end, adapter, ... over all rows: of
    the two they go first, and where both are there they say the same); scaling: n floats; the rest as in `tier.Tier`.
    Under runs alone an adapter no row used gets None as its gradient; under an index it gets zeros.
    """
    if registry.under_autocast(x):
        x, weights, biases = as_autocast(x, weights, biases)
        with torch.autocast(x.device.type, enabled=False):
            return apply(
                x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows, order
            )  # fmt: skip
    tracing = torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter)
    if runs is None and index is not None and not tracing:
        runs = checked_runs(index, len(scaling))
    serving = tier.chosen(x, weights, lora_a)
    if (serving is None or forward_ad._current_level >= 0) and not x.is_meta:  # kernels would drop tangents unasked
        return _naive(x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows)
    learns = torch.is_grad_enabled() and _any_requires_grad(x, weights, biases, lora_a, lora_b)
    if scaling_tensor is not None and not tracing:
        scaling, scaling_tensor = on_host(scaling, scaling_tensor)
    if not learns and not tracing:
        assert serving is not None
        return serving.forward(
            x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, 0
        )[0]  # fmt: skip
    grad_rows = x.shape[0] if grad_rows is None else grad_rows
    saved_rows = grad_rows if learns and any(b.requires_grad for b in lora_b) else 0
    if not tracing:
        node = _NodeUnderTransforms if torch._C._are_functorch_transforms_active() else _Node
        call = Call(runs, scaling, grad_rows, saved_rows, len(weights), index is None, serving)
        return list(node.apply(call, index, scaling_tensor, order, x, *weights, *biases, *lora_a, *lora_b)[:-1])
    some = [x.new_empty(0) if b is None else b for b in biases]
    ys, _ = compiled.op(
        x, list(weights), some, list(lora_a), list(lora_b), index, None if runs is None else list(runs), list(scaling),
        scaling_tensor, order, grad_rows, saved_rows,
    )  # fmt: skip
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


def _naive(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    grad_rows: int | None,
) -> list[Tensor]:
    if index is None:
        assert runs is not None
        counts = torch.tensor([hi - lo for lo, hi, _ in triples(runs)], device=x.device, dtype=torch.long)
        adapters = torch.tensor(runs[2::3], device=x.device, dtype=torch.long)
        index = adapters.repeat_interleave(counts, output_size=x.shape[0])
    scales = scaling if scaling_tensor is None else scaling_tensor
    n, ys = len(scaling), []
    for p, (weight, bias) in enumerate(zip(weights, biases)):
        own = slice(p * n, p * n + n)
        ys.append(naive.lora_linear(x, weight, bias, lora_a[own], lora_b[own], index, scales, grad_rows))
    return ys


def _forward(
    call: Call, index: Tensor | None, scaling_tensor: Tensor | None, order: Tensor | None, x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """(*ys, s); rest: *weights, *biases, *lora_a, *lora_b."""
    weights, biases, lora_a, lora_b = parts(call, rest)
    ys, s = gradients.forward(
        x,
        weights,
        biases,
        lora_a,
        lora_b,
        index,
        call.runs,
        call.scaling,
        scaling_tensor,
        order,
        call.saved_rows,
        call.serving,
    )
    return *ys, s


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    call, index, scaling_tensor, order, x, *rest = inputs
    weights, _, lora_a, lora_b = parts(call, rest)
    ctx.mark_non_differentiable(output[-1])
    gradients.keep(ctx, call, index, scaling_tensor, order, x, weights, lora_a, lora_b, output[-1])


def _backward(ctx: Any, *grads: Any) -> tuple:
    compute = _traceable_backward if torch.is_grad_enabled() else gradients.backward
    return None, None, None, None, *gradients.gradients(ctx, grads[:-1], list(ctx.needs_input_grad[4:]), compute)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class _NodeUnderTransforms(torch.autograd.Function):
    """The same as torch.func wants it, 35 us slower."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_keep)
    backward = staticmethod(_backward)


def _traceable_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    x: Tensor,
    s: Tensor,
    grad_rows: int,
    needs: list[bool],
) -> list[Tensor]:
    """The backward under create_graph: it gives the gradients, and an error to who differentiates them."""
    call = Call(runs, scaling, grad_rows, 0, len(weights), False)

    def compute(tensors: Sequence[Tensor]) -> list[Tensor]:
        dy, w, a, b = (list(part) for part in parts(call, tensors))
        x, s = tensors[-2:]
        return gradients.backward(
            dy, w, a, b, index, runs, scaling, scaling_tensor, order, x, s, grad_rows, needs
        )  # fmt: skip

    return list(_LastNode.apply(compute, *grads, *weights, *lora_a, *lora_b, x, s))


class _LastNode(torch.autograd.Function):
    @staticmethod
    def forward(compute: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(compute(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients.no_second()
