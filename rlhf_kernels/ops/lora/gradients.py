"""The two halves of `lora_linears` under autograd: what a forward keeps, and the gradients from it.

Kept are x where a dA or dweight needs it, S where a dB does, of both the first grad_rows rows only, and weights where
dx needs them. What a tier does not read it gets as a stand-in of the right shape, without memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import tier
from rlhf_kernels.ops.lora.library import widths
from rlhf_kernels.ops.lora.routing import host_runs, triples


@dataclass(slots=True)
class Call:
    """What of a call is no tensor."""

    runs: Sequence[int] | None
    scaling: Sequence[float]
    grad_rows: int
    saved_rows: int
    projections: int
    runs_alone: bool  # an adapter they do not name gets None as its gradient
    serving: tier.Tier | None = None  # the forward, where it is chosen already


def keep(
    ctx: Any,
    call: Call,
    index: Tensor | None,
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    s: Tensor,
) -> None:
    """Saves what the backward reads."""
    ctx.set_materialize_grads(False)
    ctx.call, ctx.inputs = call, x.shape[1]
    ctx.runs = None if call.runs is None else _live_runs(call.runs, call.grad_rows)
    if ctx.runs is not None:
        index = None
    elif index is not None and index.device.type == "cpu":
        index = index.clone()  # its owner may overwrite it before the backward, which is this forward's
    ctx.outputs = None if x.requires_grad else [w.shape[0] for w in weights]
    kept_x = None
    if _any_requires_grad(lora_a) or _any_requires_grad(weights):
        kept_x = x if call.grad_rows == x.shape[0] else x[: call.grad_rows]
    ctx.save_for_backward(
        index, scaling_tensor, order, kept_x, s, *(weights if x.requires_grad else ()), *lora_a, *lora_b
    )


def _any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)


def _live_runs(runs: Sequence[int], grad_rows: int) -> Sequence[int]:
    """The runs below grad_rows."""
    if len(runs) == 3 and runs[0] == 0 and runs[1] <= grad_rows:
        return runs
    live: list[int] = []
    for lo, hi, e in triples(runs):
        if lo < grad_rows and hi > lo:
            live += (lo, min(hi, grad_rows), e)
    return live or [0, 0, -1]


def gradients(ctx: Any, grads: Sequence[Tensor | None], needs: list[Any], compute: Callable) -> list[Tensor | None]:
    """[dx, *dweights, *dbiases, *dA, *dB] by `compute`, a tier's backward.

    `needs`, in that order, is what autograd asks for. An output that nobody used gives nothing to its own weight, bias
    and adapters; nor, where the host alone knew the runs, does an adapter that no row used get anything.
    """
    call: Call = ctx.call
    index, scaling_tensor, order, x, s, *rest = ctx.saved_tensors
    count, n = call.projections, len(call.scaling)
    present = [grad is not None for grad in grads]
    if not any(present):
        return [None] * len(needs)
    used = {int(e) for e in ctx.runs[2::3]} if call.runs_alone else range(n)
    owners = [(p, 0) for p in range(count)] * 2 + [(p, e) for p in range(count) for e in range(n)] * 2
    adapters = 2 * count
    needs = [bool(needs[0])] + [
        bool(need) and present[p] and (i < adapters or e in used)
        for i, (need, (p, e)) in enumerate(zip(needs[1:], owners))
    ]
    if not any(needs):
        return [None] * len(needs)
    if ctx.outputs is None:
        weights, rest = rest[:count], rest[count:]
    else:
        weights = [s.new_empty(()).expand(n_out, ctx.inputs) for n_out in ctx.outputs]
    if x is None:
        x = s.new_empty(()).expand(call.grad_rows, ctx.inputs)
    some = [s.new_empty(0) if grad is None else grad.contiguous() for grad in grads]
    lora_a, lora_b = rest[: count * n], rest[count * n :]
    out = compute(
        some, weights, lora_a, lora_b, index, ctx.runs, call.scaling, scaling_tensor, order, x, s, call.grad_rows,
        needs,
    )  # fmt: skip
    return [grad if need else None for grad, need in zip(out, needs)]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    saved_rows: int,
    serving: tier.Tier | None = None,
) -> tuple[list[Tensor], Tensor]:
    serving = serving or tier.chosen(x, weights, lora_a)
    assert serving is not None
    ys, s = serving.forward(
        x, weights, biases, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, saved_rows
    )  # fmt: skip
    return ys, x.new_empty(saved_rows, sum(widths(lora_a, len(weights)))) if s is None else s


def backward(
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
    if runs is None and index is not None:
        runs = checked_runs(index[:grad_rows], len(scaling))
    scaling, scaling_tensor = on_host(scaling, scaling_tensor)
    serving = tier.chosen(x, weights, lora_a, backward=True)
    assert serving is not None
    with registry.no_autocast(s):
        return serving.backward(
            grads, weights, lora_a, lora_b, index, runs, scaling, scaling_tensor, order, x, s, grad_rows, needs
        )


def no_second(*_: Any) -> Any:
    """The formula of the backward's own backward."""
    raise RuntimeError("lora_linear has no second derivative; RLHF_KERNELS_BACKEND=naive gives one")


def checked_runs(index: Tensor, n: int) -> list[int] | None:
    """The runs of an index, checked, where the host may look."""
    return host_runs(index, n) if registry.checks_values(index) else None


def on_host(scaling: Sequence[float], scaling_tensor: Tensor | None) -> tuple[Sequence[float], Tensor | None]:
    """A scaling on the CPU as floats."""
    if scaling_tensor is not None and scaling_tensor.device.type == "cpu":
        return scaling_tensor.tolist(), None
    return scaling, scaling_tensor


def parts(call: Call, tensors: Sequence[Any]) -> tuple[Sequence[Any], ...]:
    """weights, biases, lora_a, lora_b."""
    count, adapters = call.projections, call.projections * len(call.scaling)
    a, b = 2 * count, 2 * count + adapters
    return tensors[:count], tensors[count:a], tensors[a:b], tensors[b : b + adapters]
