"""`lora_linear`: a linear layer and the adapters of all rows of a batch in one differentiable op; `lora_linears`:
several such layers that share their input."""

import math
from collections.abc import Sequence

from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import direct
from rlhf_kernels.ops.lora.autograd import apply, as_autocast
from rlhf_kernels.ops.lora.checks import (
    check_grad_rows,
    check_projection,
    check_routing,
    check_scaling,
    check_x,
    cut_to_ranks,
)
from rlhf_kernels.ops.lora.routing import Routing


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    adapter_index: Tensor | int | None = None,
    scaling: float | Sequence[float] | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    ranks: Sequence[int] | Tensor | None = None,
    grad_rows: int | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """y[i] = x[i] W^T + bias + scaling[e] (x[i] A_e^T) B_e^T, e = adapter_index[i]; e = -1 is the bypass (no adapter).

    Args:
        x: [..., K], floating point.
        weight: [N, K], dtype and device of x. A frozen weight costs no dW GEMM.
        lora_a: [n, r, K] (PEFT's layout stacked over n adapters), a 2-D [r, K] for n = 1, or a sequence of n matrices
            [r_e, K] of any ranks. Adapters may have another dtype than x; they are cast on use.
        lora_b: [n, N, r], [N, r] or a sequence, as lora_a.
        adapter_index: int tensor of shape x.shape[:-1] or a prefix of it, one int, or None (0; n = 1 only).
        scaling: float, or [n].
        bias: [N] or None.
        ranks: int [n], the true rank of each padded slot: what lies beyond is neither read nor given a gradient.
        grad_rows: only the first grad_rows rows (of the flattened x) need gradients; the others get zeros.
        routing: `build_routing(adapter_index, n)`, computed once a batch; it stands for adapter_index.

    Returns:
        [..., N] of x's dtype (under autocast: in autocast's, as torch's linear gives it). Differentiable in x, weight,
        bias, lora_a and lora_b where they require it.

    Guarantees: a row does not see another row's adapter, whatever that holds (NaN, inf); a bypassed row is bit-equal to
    the same call with every row bypassed; W is never copied, x only where an adapter's rows lie scattered.

    Raises:
        TypeError, ValueError: an argument of the wrong type or shape, named. IndexError: an index outside [-1, n), on
        the CPU or with RLHF_KERNELS_CHECK=1; elsewhere that row is NaN.

    Source: LoRA (arXiv 2106.09685), routed by row as Hydra-RLHF's dynamic LoRA (arXiv 2309.00754) needs it.
    """
    if routing is not None and adapter_index is None and ranks is None and grad_rows is None:
        y = direct.linear(x, weight, lora_a, lora_b, scaling, bias, routing)
        if y is not None:
            return y
    return _projections(
        x, (weight,), (lora_a,), (lora_b,), adapter_index, scaling, (bias,), ranks, grad_rows, routing, ("",)
    )[0]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor | Sequence[Tensor]],
    lora_b: Sequence[Tensor | Sequence[Tensor]],
    adapter_index: Tensor | int | None = None,
    scaling: float | Sequence[float] | Tensor = 1.0,
    biases: Sequence[Tensor | None] | None = None,
    *,
    ranks: Sequence[int] | Tensor | None = None,
    grad_rows: int | None = None,
    routing: Routing | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for P linears that share x (q, k, v; gate, up): one op, one pass over x for all their adapters.

    Args:
        weights: P tensors [N_p, K].
        lora_a, lora_b: P entries, each what `lora_linear` takes, all of n adapters; ranks may differ.
        biases: P tensors [N_p], None for one that has none; or None for all.
        The rest: as in `lora_linear`, for all P alike.

    Returns:
        P tensors [..., N_p]. One that the loss does not use costs no GEMM in the backward.

    Raises:
        As `lora_linear`; ValueError where the lists are not equally long.
    """
    if not isinstance(weights, (list, tuple)) or not weights:
        raise TypeError(f"weights must be a sequence of at least one tensor, not {type(weights).__name__}")
    count = len(weights)
    biases = (None,) * count if biases is None else biases
    for name, value in (("lora_a", lora_a), ("lora_b", lora_b), ("biases", biases)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a sequence of {count}, one for each weight, not {type(value).__name__}")
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} entries, weights {count}; they must agree")
    at = tuple(f"[{p}]" for p in range(count))
    return _projections(x, weights, lora_a, lora_b, adapter_index, scaling, biases, ranks, grad_rows, routing, at)


def _projections(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor | Sequence[Tensor]],
    lora_b: Sequence[Tensor | Sequence[Tensor]],
    adapter_index: Tensor | int | None,
    scaling: float | Sequence[float] | Tensor,
    biases: Sequence[Tensor | None],
    ranks: Sequence[int] | Tensor | None,
    grad_rows: int | None,
    routing: Routing | None,
    at: Sequence[str],
) -> tuple[Tensor, ...]:
    check_x(x)
    if registry.under_autocast(x) and all(isinstance(t, Tensor) for t in (*weights, *biases) if t is not None):
        x, weights, biases = as_autocast(x, weights, biases)
    a_flat: list[Tensor] = []
    b_flat: list[Tensor] = []
    n = -1
    for weight, bias, some_a, some_b, place in zip(weights, biases, lora_a, lora_b, at):
        a_list, b_list = check_projection(x, weight, bias, some_a, some_b, place)
        if n not in (-1, len(a_list)):
            raise ValueError(f"lora_a{place} has {len(a_list)} adapters, lora_a[0] {n}; they must agree")
        n = len(a_list)
        if ranks is not None:
            a_list, b_list = cut_to_ranks(a_list, b_list, ranks)
        a_flat += a_list
        b_flat += b_list
    scales, scaling_tensor = check_scaling(scaling, n, x)
    *shape, features = x.shape
    flat = x if len(shape) == 1 else x.reshape(math.prod(shape), features)
    rows = flat.shape[0]
    grad_rows = check_grad_rows(grad_rows, rows, routing)
    index, runs, order = check_routing(x, rows, n, adapter_index, routing)
    ys = apply(flat, weights, biases, a_flat, b_flat, index, runs, scales, scaling_tensor, grad_rows, order)
    return tuple(ys) if len(shape) == 1 else tuple(y.view(*shape, y.shape[1]) for y in ys)
