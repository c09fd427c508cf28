"""`lora_linear`: a linear layer and the adapters of all rows of a batch in one differentiable op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import naive, native
from rlhf_kernels.ops.lora.routing import Routing, check_index


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
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and registry.under_autocast(x):
        x, weight, bias = _as_autocast(x, weight, bias)
    a_list, b_list = _check_adapters(x, weight, bias, lora_a, lora_b)
    n = len(a_list)
    rows = math.prod(x.shape[:-1])
    scales, scaling_tensor = _check_scaling(scaling, n, x)
    if ranks is not None:
        a_list, b_list = _cut_to_ranks(a_list, b_list, ranks)
    if grad_rows is None and routing is not None and routing.grad_rows is not None and routing.rows:
        grad_rows = routing.grad_rows * (rows // routing.rows)
    if grad_rows is not None and (not isinstance(grad_rows, int) or not 0 <= grad_rows <= rows):
        raise ValueError(f"grad_rows is {grad_rows!r}; it must be an int in [0, {rows}], the number of rows")
    index, runs = _check_routing(x, rows, n, adapter_index, routing)
    y = apply(
        x.reshape(rows, x.shape[-1]), weight, bias, a_list, b_list, index, runs, scales, scaling_tensor, grad_rows
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: list[int] | None,
    scaling: list[float],
    scaling_tensor: Tensor | None = None,
    grad_rows: int | None = None,
) -> Tensor:
    """The op without its checks: x [rows, K]; index int [rows] and/or runs (see Routing); used by LoRALinear."""
    if registry.under_autocast(x):
        x, weight, bias = _as_autocast(x, weight, bias)
    if runs is not None and not runs:  # no rows; an empty list is no input torch.library can give a gradient back for
        runs = [0, 0, -1]
    if registry.choose("lora_linear", x) == "naive":
        if index is None:
            assert runs is not None
            counts = torch.tensor([hi - lo for lo, hi, _ in native.triples(runs)], device=x.device)
            index = torch.tensor(runs[2::3], device=x.device).repeat_interleave(counts, output_size=x.shape[0])
        if registry.checks_values(index):
            check_index(index, len(lora_a))
        scales = scaling if scaling_tensor is None else scaling_tensor
        return naive.lora_linear(x, weight, bias, lora_a, lora_b, index, scales, grad_rows)
    grad_rows = x.shape[0] if grad_rows is None else grad_rows
    tensors = (x, weight, bias, *lora_a, *lora_b)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if differentiable or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return _op(x, weight, bias, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows)[0]
    if runs is not None and scaling_tensor is None:
        return native.infer(x, weight, bias, lora_a, lora_b, runs, scaling)
    return native.forward(x, weight, bias, lora_a, lora_b, index, runs, scaling, scaling_tensor)[0]


def _as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the dtype that autocast gives torch's own linear; float64 is left alone."""
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias)]
    assert cast[0] is not None
    assert cast[1] is not None
    return cast[0], cast[1], cast[2]


# ---- the op: forward, fake, autograd ---------------------------------------------------------------------------------


@torch.library.custom_op("rlhf_kernels::lora_linear", mutates_args=())
def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: list[int] | None,
    scaling: list[float],
    scaling_tensor: Tensor | None,
    grad_rows: int,
) -> tuple[Tensor, Tensor]:
    return native.forward(x, weight, bias, lora_a, lora_b, index, runs, scaling, scaling_tensor)


@_op.register_fake
def _(x, weight, bias, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], native.saved_width(x, lora_a, runs))


@torch.library.custom_op("rlhf_kernels::lora_linear_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    index: Tensor | None,
    runs: list[int] | None,
    scaling: list[float],
    scaling_tensor: Tensor | None,
    x: Tensor | None,
    x_parts: list[Tensor],
    s_parts: list[Tensor],
    grad_rows: int,
    needs: list[bool],
) -> list[Tensor]:
    return native.backward(
        grad, weight, lora_a, lora_b, index, runs, scaling, scaling_tensor, x, x_parts, s_parts, grad_rows, needs
    )


@_backward_op.register_fake
def _(grad, weight, lora_a, lora_b, index, runs, scaling, scaling_tensor, x, x_parts, s_parts, grad_rows, needs):
    n = len(lora_a)
    shapes = [(grad.shape[0], weight.shape[1]), weight.shape, (weight.shape[0],)]
    out = [grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs)]
    for tensor, need in zip((*lora_a, *lora_b), needs[3 : 3 + 2 * n]):
        out.append(torch.empty_like(tensor) if need else grad.new_empty(0))
    return out


def _live_runs(runs: list[int] | None, grad_rows: int) -> list[int] | None:
    """The runs below grad_rows."""
    if runs is None:
        return None
    live: list[int] = []
    for lo, hi, e in native.triples(runs):
        if lo < grad_rows:
            live += (lo, min(hi, grad_rows), e)
    return live


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, lora_a, lora_b, index, runs, scaling, scaling_tensor, grad_rows = inputs
    s = output[1]
    ctx.runs = _live_runs(runs, grad_rows)
    ctx.scaling, ctx.grad_rows, ctx.n = list(scaling), grad_rows, len(lora_a)
    if ctx.runs is None:
        whole, x_parts, s_parts = x, [], [s]
    else:  # rows without an adapter, and rows that need no gradient, are not kept
        spans = [rows for rows, _ in native.segments(None, ctx.runs, lora_a)]
        whole = x if weight.requires_grad else None
        x_parts, s_parts = [x[rows] for rows in spans], [s[rows] for rows in spans]
    ctx.parts = len(x_parts), len(s_parts)
    ctx.save_for_backward(weight, index, scaling_tensor, whole, *lora_a, *lora_b, *x_parts, *s_parts)


def _backward(ctx, grad, _grad_s):
    weight, index, scaling_tensor, x, *rest = ctx.saved_tensors
    n, (xs, _) = ctx.n, ctx.parts
    lora_a, lora_b, x_parts, s_parts = rest[:n], rest[n : 2 * n], rest[2 * n : 2 * n + xs], rest[2 * n + xs :]
    need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    used = range(n) if ctx.runs is None else set(ctx.runs[2::3])  # an adapter no row used gets None, not zeros
    need_a = [bool(need) and e in used for e, need in enumerate(need_a or [])]
    need_b = [bool(need) and e in used for e, need in enumerate(need_b or [])]
    needs = [need_x, need_w, need_bias, *need_a, *need_b]
    grads = _backward_op(
        grad.contiguous(), weight, lora_a, lora_b, index, ctx.runs, ctx.scaling, scaling_tensor,
        x, x_parts, s_parts, ctx.grad_rows, needs,
    )  # fmt: skip
    grads = [g if need else None for g, need in zip(grads, needs)]
    return *grads[:3], grads[3 : 3 + n], grads[3 + n :], None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_adapters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"x must be a floating-point tensor [..., K], not {_what(x)}")
    k = x.shape[-1]
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != k:
        raise ValueError(f"weight is {_what(weight)}; with x of {k} features it must be [N, {k}]")
    n_out = weight.shape[0]
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != (n_out,)):
        raise ValueError(f"bias is {_what(bias)}; it must be [{n_out}]")
    a_list, b_list = _unstack("lora_a", lora_a), _unstack("lora_b", lora_b)
    if len(a_list) != len(b_list):
        raise ValueError(f"lora_a has {len(a_list)} adapters, lora_b {len(b_list)}; they must agree")
    for e, (a, b) in enumerate(zip(a_list, b_list)):
        if a.ndim != 2 or a.shape[1] != k:
            raise ValueError(f"lora_a of adapter {e} is {list(a.shape)}; it must be [r, {k}]")
        if b.shape != (n_out, a.shape[0]):
            raise ValueError(f"lora_b of adapter {e} is {list(b.shape)}; it must be [{n_out}, {a.shape[0]}]")
        for name, tensor in (("lora_a", a), ("lora_b", b)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name} is {tensor.dtype}; it must be floating point")
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must be on one device")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise TypeError(f"{name} is {value.dtype}; it must have x's dtype, {x.dtype}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, x on {x.device}; they must be on one device")
    return a_list, b_list


def _unstack(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim not in (2, 3):
            raise ValueError(f"{name} is {list(value.shape)}; it must be 3-D, [n, ...], or 2-D for one adapter")
        return [value] if value.ndim == 2 else list(value.unbind(0))
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, Tensor) for t in value):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, not {_what(value)}")
    return list(value)


def _check_scaling(scaling: float | Sequence[float] | Tensor, n: int, x: Tensor) -> tuple[list[float], Tensor | None]:
    if isinstance(scaling, Tensor) and scaling.ndim > 0:
        if scaling.shape != (n,):
            raise ValueError(f"scaling is {list(scaling.shape)}; it must be a float or [{n}]")
        if scaling.device.type == "cpu" and not torch.compiler.is_compiling():
            return scaling.tolist(), None
        if scaling.device != x.device:
            raise ValueError(f"scaling is on {scaling.device}, x on {x.device}; they must be on one device")
        return [1.0] * n, scaling.to(x.dtype)
    if isinstance(scaling, (list, tuple)):
        if len(scaling) != n:
            raise ValueError(f"scaling has {len(scaling)} entries; it must be a float or one for each of {n} adapters")
        return [float(s) for s in scaling], None
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float, Tensor)):
        raise TypeError(f"scaling is {_what(scaling)}; it must be a float or [{n}]")
    return [float(scaling)] * n, None


def _cut_to_ranks(
    a_list: list[Tensor], b_list: list[Tensor], ranks: Sequence[int] | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    n = len(a_list)
    if len(ranks) != n:
        raise ValueError(f"ranks has {len(ranks)} entries; it must have one for each of {n} adapters")
    if isinstance(ranks, Tensor) and (ranks.device.type != "cpu" or torch.compiler.is_compiling()):
        for e, rank in enumerate(ranks.unbind(0)):  # the host may not look: select zeros beyond the rank
            real = torch.arange(a_list[e].shape[0], device=rank.device) < rank
            a_list[e] = torch.where(real.unsqueeze(1), a_list[e], 0.0)
            b_list[e] = torch.where(real, b_list[e], 0.0)
        return a_list, b_list
    for e, rank in enumerate(ranks.tolist() if isinstance(ranks, Tensor) else ranks):
        if not isinstance(rank, int) or not 0 <= rank <= a_list[e].shape[0]:
            raise ValueError(f"ranks[{e}] is {rank!r}; it must be an int in [0, {a_list[e].shape[0]}]")
        a_list[e], b_list[e] = a_list[e][:rank], b_list[e][:, :rank]
    return a_list, b_list


def _check_routing(
    x: Tensor, rows: int, n: int, adapter_index: Tensor | int | None, routing: Routing | None
) -> tuple[Tensor | None, list[int] | None]:
    """The index [rows] and, where known, the runs, whole batch each."""
    if isinstance(adapter_index, Tensor):
        if adapter_index.is_floating_point() or adapter_index.dtype == torch.bool:
            raise TypeError(f"adapter_index is {adapter_index.dtype}; it must be an int tensor")
        if adapter_index.shape != x.shape[: adapter_index.ndim] or adapter_index.ndim >= x.ndim:
            raise ValueError(
                f"adapter_index is {list(adapter_index.shape)}; it must be {list(x.shape[:-1])} or a prefix of it"
            )
        if adapter_index.device != x.device:
            raise ValueError(f"adapter_index is on {adapter_index.device}, x on {x.device}; use one device")
    elif adapter_index is not None and (isinstance(adapter_index, bool) or not isinstance(adapter_index, int)):
        raise TypeError(f"adapter_index is {_what(adapter_index)}; it must be an int tensor, an int or None")
    if routing is not None:
        return _expand(routing, rows, n)
    if isinstance(adapter_index, Tensor):
        index = adapter_index.reshape(-1)
        repeats = rows // index.numel() if index.numel() else 1
        return (index if repeats == 1 else index.repeat_interleave(repeats, output_size=rows)), None
    if adapter_index is None:
        if n != 1:
            raise ValueError(f"adapter_index is None with {n} adapters; say which adapter each row uses")
        adapter_index = 0
    if not -1 <= adapter_index < n:
        raise IndexError(f"adapter_index is {adapter_index}; with {n} adapters it must lie in [-1, {n - 1}]")
    return None, [0, rows, adapter_index]


def _expand(routing: Routing, rows: int, n: int) -> tuple[Tensor | None, list[int] | None]:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is {_what(routing)}; it must come from build_routing")
    if routing.adapters != n:
        raise ValueError(f"routing was built for {routing.adapters} adapters; lora_a has {n}")
    if (routing.rows == 0 or rows % routing.rows) and rows != routing.rows:
        raise ValueError(f"routing was built for {routing.rows} rows; x has {rows}, not a multiple of it")
    repeats = rows // routing.rows if routing.rows else 1
    if routing.runs is not None:
        runs = [v if i % 3 == 2 else v * repeats for i, v in enumerate(routing.runs)]
        return None, runs
    assert routing.index is not None
    index = routing.index if repeats == 1 else routing.index.repeat_interleave(repeats, output_size=rows)
    return index, None


def _what(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
