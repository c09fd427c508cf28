"""Checks of lora_linear's arguments: each names the argument, what it was, and what would be right."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.lora.routing import Routing, is_index, repeated


def check_x(x: Any) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise TypeError(f"x must be a floating-point tensor [..., K], not {_what(x)}")


def check_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    at: str = "",
) -> tuple[list[Tensor], list[Tensor]]:
    """One linear and its adapters, as lists of matrices. at: "[p]" where the arguments are lists of projections."""
    k, dtype, device = x.shape[-1], x.dtype, x.device
    weights = "weights" if at else "weight"
    biases = "biases" if at else "bias"
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != k:
        raise ValueError(f"{weights}{at} is {_what(weight)}; with x of {k} features it must be [N, {k}]")
    if weight.dtype != dtype or weight.device != device:
        _check_place(weights + at, weight, x)
    n_out = weight.shape[0]
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != (n_out,):
            raise ValueError(f"{biases}{at} is {_what(bias)}; it must be [{n_out}]")
        if bias.dtype != dtype or bias.device != device:
            _check_place(biases + at, bias, x)
    a_list, b_list = _unstack("lora_a" + at, lora_a), _unstack("lora_b" + at, lora_b)
    if len(a_list) != len(b_list):
        raise ValueError(f"lora_a{at} has {len(a_list)} adapters, lora_b{at} {len(b_list)}; they must agree")
    stacked = isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor)  # then the first stands for all
    for e, (a, b) in enumerate(zip(a_list[:1], b_list) if stacked else zip(a_list, b_list)):
        size_a, size_b = a.shape, b.shape
        if len(size_a) != 2 or size_a[1] != k:
            raise ValueError(f"lora_a{at} of adapter {e} is {list(size_a)}; it must be [r, {k}]")
        if len(size_b) != 2 or size_b[0] != n_out or size_b[1] != size_a[0]:
            raise ValueError(f"lora_b{at} of adapter {e} is {list(size_b)}; it must be [{n_out}, {size_a[0]}]")
        for name, tensor in (("lora_a", a), ("lora_b", b)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name}{at} is {tensor.dtype}; it must be floating point")
            if tensor.device != device:
                _check_place(name + at, tensor, x, any_dtype=True)
    return a_list, b_list


def _check_place(name: str, value: Tensor, x: Tensor, any_dtype: bool = False) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, x on {x.device}; they must be on one device")
    if value.dtype != x.dtype and not any_dtype:
        raise TypeError(f"{name} is {value.dtype}; it must have x's dtype, {x.dtype}")


def _unstack(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        if value.ndim not in (2, 3):
            raise ValueError(f"{name} is {list(value.shape)}; it must be 3-D, [n, ...], or 2-D for one adapter")
        return [value] if value.ndim == 2 else list(value.unbind(0))
    if not isinstance(value, (list, tuple)) or not all([isinstance(t, Tensor) for t in value]):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, not {_what(value)}")
    return list(value)


def check_scaling(scaling: float | Sequence[float] | Tensor, n: int, x: Tensor) -> tuple[list[float], Tensor | None]:
    """Floats, and beside them a tensor where the host may not read it."""
    if isinstance(scaling, (int, float)) and not isinstance(scaling, bool):
        return [float(scaling)] * n, None
    if isinstance(scaling, Tensor):
        return _check_scaling_tensor(scaling, n, x)
    if not isinstance(scaling, (list, tuple)):
        raise TypeError(f"scaling is {_what(scaling)}; it must be a float or [{n}]")
    if len(scaling) != n:
        raise ValueError(f"scaling has {len(scaling)} entries; it must be a float or one for each of {n} adapters")
    return [float(s) for s in scaling], None


def _check_scaling_tensor(scaling: Tensor, n: int, x: Tensor) -> tuple[list[float], Tensor | None]:
    if scaling.ndim and scaling.shape != (n,):
        raise ValueError(f"scaling is {list(scaling.shape)}; it must be a float or [{n}]")
    if scaling.requires_grad and torch.is_grad_enabled():
        raise ValueError("scaling requires a gradient; it gets none here: detach it, or scale lora_b instead")
    scaling = scaling.detach()
    if scaling.device.type == "cpu" and not torch.compiler.is_compiling():
        return (scaling.tolist() if scaling.ndim else [float(scaling)] * n), None
    if scaling.device != x.device and scaling.ndim:
        raise ValueError(f"scaling is on {scaling.device}, x on {x.device}; they must be on one device")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [1.0] * n, scaling.to(x.device, exact).expand(n)


def cut_to_ranks(
    a_list: list[Tensor], b_list: list[Tensor], ranks: Sequence[int] | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The adapters without what lies beyond their ranks."""
    n = len(a_list)
    if not isinstance(ranks, (Tensor, list, tuple)):
        raise TypeError(f"ranks is {_what(ranks)}; it must be {n} ints or an int tensor [{n}]")
    if isinstance(ranks, Tensor) and not is_index(ranks):
        raise TypeError(f"ranks is {ranks.dtype}; it must hold ints")
    if isinstance(ranks, Tensor) and ranks.ndim != 1:
        raise ValueError(f"ranks is {list(ranks.shape)}; it must be [{n}]")
    if len(ranks) != n:
        raise ValueError(f"ranks has {len(ranks)} entries; it must have one for each of {n} adapters")
    if isinstance(ranks, Tensor) and (ranks.device.type != "cpu" or torch.compiler.is_compiling()):
        pairs = []
        for a, b, rank in zip(a_list, b_list, ranks.unbind(0)):  # the host may not look: select zeros beyond the rank
            real = torch.arange(a.shape[0], device=rank.device) < rank
            pairs.append((torch.where(real.unsqueeze(1), a, 0.0), torch.where(real, b, 0.0)))
        return [a for a, _ in pairs], [b for _, b in pairs]
    cut = ranks.tolist() if isinstance(ranks, Tensor) else ranks
    for e, rank in enumerate(cut):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= a_list[e].shape[0]:
            raise ValueError(f"ranks[{e}] is {rank!r}; it must be an int in [0, {a_list[e].shape[0]}]")
    return [a[:rank] for a, rank in zip(a_list, cut)], [b[:, :rank] for b, rank in zip(b_list, cut)]


def check_grad_rows(grad_rows: int | None, rows: int, routing: Routing | None) -> int | None:
    """The number of rows that need gradients: the argument, or what the routing says of its entries."""
    if routing is not None and not isinstance(routing, Routing):
        raise TypeError(f"routing is {_what(routing)}; it must come from build_routing")
    if grad_rows is None:
        if routing is None or routing.grad_rows is None or not routing.rows:
            return None
        return routing.grad_rows * (rows // routing.rows)
    if isinstance(grad_rows, bool) or not isinstance(grad_rows, (int, torch.SymInt)) or not 0 <= grad_rows <= rows:
        raise ValueError(f"grad_rows is {grad_rows!r}; it must be an int in [0, {rows}], the number of rows")
    return grad_rows


def check_routing(
    x: Tensor, rows: int, n: int, adapter_index: Tensor | int | None, routing: Routing | None
) -> tuple[Tensor | None, list[int] | None, Tensor | None]:
    """index, runs and order as `autograd.apply` takes them, for all `rows` rows of x."""
    if isinstance(adapter_index, Tensor):
        if not is_index(adapter_index):
            raise TypeError(f"adapter_index is {adapter_index.dtype}; it must be an int tensor")
        if adapter_index.ndim >= x.ndim or adapter_index.shape != x.shape[: adapter_index.ndim]:
            raise ValueError(
                f"adapter_index is {list(adapter_index.shape)}; it must be {list(x.shape[:-1])} or a prefix of it"
            )
        if adapter_index.device != x.device:
            raise ValueError(f"adapter_index is on {adapter_index.device}, x on {x.device}; they must be on one device")
    elif adapter_index is not None and (isinstance(adapter_index, bool) or not isinstance(adapter_index, int)):
        raise TypeError(f"adapter_index is {_what(adapter_index)}; it must be an int tensor, an int or None")
    if routing is not None:
        return _expand(routing, rows, n, x.device)
    if isinstance(adapter_index, Tensor):
        index = adapter_index if adapter_index.ndim == 1 else adapter_index.reshape(-1)
        entries = index.shape[0]
        whole = index if entries in (0, rows) else index.repeat_interleave(rows // entries, output_size=rows)
        return whole, None, None
    if adapter_index is None:
        if n != 1:
            raise ValueError(f"adapter_index is None with {n} adapters; say which adapter each row uses")
        adapter_index = 0
    if not -1 <= adapter_index < n:
        raise IndexError(f"adapter_index is {adapter_index}; with {n} adapters it must lie in [-1, {n - 1}]")
    return None, [0, rows, adapter_index], None


def _expand(
    routing: Routing, rows: int, n: int, device: torch.device
) -> tuple[Tensor | None, list[int] | None, Tensor | None]:
    if routing.adapters != n:
        raise ValueError(f"routing was built for {routing.adapters} adapters; lora_a has {n}")
    if (routing.rows == 0 or rows % routing.rows) and rows != routing.rows:
        raise ValueError(f"routing was built for {routing.rows} rows; x has {rows}, not a multiple of it")
    index, runs, order = routing.index, routing.host_runs(), routing.order
    if index is not None and index.device != device:
        raise ValueError(f"routing is on {index.device}, x on {device}; they must be on one device")
    repeats = rows // routing.rows if routing.rows else 1
    if repeats == 1:
        return index, runs, order
    if runs is not None:
        runs = repeated(runs, repeats)
    if index is not None:
        index = index.repeat_interleave(repeats, output_size=rows)
    if order is not None:
        order = (order.unsqueeze(1) * repeats + torch.arange(repeats, device=order.device)).view(-1)
    return index, runs, order


def _what(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
