"""The public `linear_logprob`: argument checks, the choice of what backward is left, and the derived estimators."""

import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob import naive, op
from rlhf_kernels.ops.logprob.native import HALF_AND_SINGLE
from rlhf_kernels.ops.logprob.outputs import DIVERGENCES, FIELDS, SAMPLED, LinearLogprobOutput, sampled_estimator

Save = Literal["auto", "grad_vector", "recompute", "logits"]

registry.serves("linear_logprob", "native", ("cpu", "cuda"), HALF_AND_SINGLE)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    entropy: bool = False,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    divergence: Collection[str] = (),
    lora: tuple[Tensor, Tensor, Tensor | int | None, float | Tensor] | None = None,
    grad_fields: Collection[str] | None = ("logprob",),
    save: Save = "auto",
    valid_rows: int | None = None,
    deterministic: bool = False,
    tp_group: Any = None,
) -> LinearLogprobOutput:
    """Log-probabilities of `target` under the language-model head, without ever holding [rows, V] logits.

    With u = logit_scale * (hidden W^T + bias), z = softcap * tanh(u / softcap) / temperature (u / temperature without
    softcap) and p = softmax(z), per token:

    - logprob = log p[target], lse = logsumexp(z), entropy = -sum p log p (nats; with `entropy=True`);
    - with `ref_hidden`, q the same of the reference: ref_logprob = log q[target], and those of `divergence` asked for:
      kl = KL(p || q), rkl = KL(q || p), js (Jensen-Shannon, in [0, ln 2]) over the whole vocabulary, and the estimators
      k1 = logprob - ref_logprob, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1 (Schulman, "Approximating KL divergence").

    Args:
        hidden: [..., H], fp32, bf16, fp16 (float64 goes through the plain formula with full logits).
        weight: [V, H]; with `tp_group`, this rank's shard of the rows.
        target: int [...], already shifted by the caller.
        bias: [V], also applied to the reference.
        temperature: > 0, a float or a tensor that broadcasts to target's shape (per row).
        softcap: final logit softcap (Gemma 2), None or 0 for none.
        logit_scale: multiplies the raw logits (Cohere, Granite).
        ignore_index: rows with this target cost no GEMM and are exactly 0 in every output and gradient.
        ref_hidden: [..., H], the reference model's hidden states. The reference's logits are constants: no gradient
            flows through them, also not to a shared weight.
        ref_weight: [V, H], None shares `weight` (both sides then run in one GEMM).
        lora: (A, B, adapter_index, scaling) on the head, policy only; A [n, r, H] and B [n, V, r] (or 2-D, n = 1),
            adapter_index int tensor of target's shape, one int, or None (= 0); -1 is no adapter; scaling float or [n].
        grad_fields: fields that carry gradient, each with its own per-token upstream gradient; the others are detached.
            None: all that are asked for.
        save: what the forward keeps. "grad_vector": d field / d hidden [rows, H] a field (nothing but `hidden` may need
            a gradient; two GEMMs in all for logprob, k1, k2, k3); "recompute": nothing, backward repeats the GEMM;
            "logits": fp32 logits [rows, V]; "auto": grad_vector where it is free, else recompute.
        valid_rows: number of targets other than ignore_index; on CUDA it saves reading that count back.
        deterministic: results are bitwise repeatable on the CPU in any case.
        tp_group: process group over which the vocabulary is sharded; outputs are those of the whole vocabulary, and
            the gradient of `hidden` is summed over the ranks.

    Returns:
        LinearLogprobOutput, fp32 fields in target's shape, None where not asked for.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, temperature <= 0, save="grad_vector" when more
            than `hidden` needs a gradient. IndexError: a target or adapter index out of range (CPU).
    """
    names = _check(
        hidden, weight, target, bias, temperature, softcap, logit_scale, ref_hidden, ref_weight, divergence, entropy,
        grad_fields, save, valid_rows,
    )  # fmt: skip
    carried = names if grad_fields is None else tuple(name for name in names if name in grad_fields)
    if lora is not None:
        lora = _check_lora(lora, hidden, weight, target)
    if registry.choose("linear_logprob", hidden) == "naive" and tp_group is None:
        a, b = (None, None) if lora is None else lora[:2]
        _resolve_save(save, hidden, [x for x in (weight, bias, a, b) if x is not None and x.requires_grad], ())
        _check_values(target, weight.shape[0], temperature, ignore_index, lora, valid_rows)
        found = naive.linear_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            ignore_index=ignore_index, entropy=entropy, ref_hidden=ref_hidden, ref_weight=ref_weight,
            divergence=divergence, lora=lora, grad_fields=carried,
        )  # fmt: skip
        return LinearLogprobOutput(**{n: f.float() for n, f in zip(FIELDS, found) if f is not None})

    rows, width = target.numel(), hidden.shape[-1]
    a, b, index, scaling = _lora_tensors(lora, target)
    trained = [x for x in (weight, bias, a, b) if x is not None and x.requires_grad]
    direct = _direct_fields(carried)
    kept = _resolve_save(save, hidden, trained, direct)
    asked = _computed_fields(names)
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature = temperature.broadcast_to(target.shape).reshape(-1)
    raw = op.forward(
        hidden.reshape(rows, width), weight, target.reshape(-1), bias, row_temperature,
        None if ref_hidden is None else ref_hidden.detach().reshape(rows, width),
        None if ref_weight is None else ref_weight.detach(), a, b, index, scaling,
        1.0 if row_temperature is not None else float(temperature), float(softcap or 0.0), float(logit_scale),
        ignore_index, ",".join(asked), ",".join(direct), kept, -1 if valid_rows is None else valid_rows,
        "" if tp_group is None else tp_group.group_name,
    )  # fmt: skip
    fields = {name: value.reshape(target.shape) for name, value in zip(op.RETURNED, raw) if name in asked}
    return _assemble(fields, names, carried)


def _assemble(fields: dict[str, Tensor], names: tuple[str, ...], carried: tuple[str, ...]) -> LinearLogprobOutput:
    """Adds k1, k2, k3 and detaches what carries no gradient."""
    out = {}
    for name in names:
        if name in SAMPLED:
            logprob = fields["logprob"] if name in carried else fields["logprob"].detach()
            out[name] = sampled_estimator(name, logprob, fields["ref_logprob"].detach())
        else:
            keep = name in carried and name != "ref_logprob"  # the reference is a constant
            out[name] = fields[name] if keep else fields[name].detach()
    return LinearLogprobOutput(**out)


def _direct_fields(carried: tuple[str, ...]) -> tuple[str, ...]:
    """The op's own outputs through which the gradients of `carried` flow."""
    through = {"logprob" if name in SAMPLED else name for name in carried} - {"ref_logprob"}
    return tuple(name for name in op.RETURNED if name in through)


def _computed_fields(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in op.RETURNED if name in names)


def _resolve_save(save: Save, hidden: Tensor, trained: list[Tensor], direct: tuple[str, ...]) -> str:
    """What the op is to keep: "none" where nothing will be differentiated."""
    if save == "grad_vector" and trained and torch.is_grad_enabled():
        raise ValueError(
            'save="grad_vector" serves hidden alone, but weight, bias or lora require a gradient; use "auto"'
        )
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained)) and bool(direct)
    if not wanted:
        return "none"
    if save != "auto":
        return save
    return "grad_vector" if not trained and direct == ("logprob",) else "recompute"


def _lora_tensors(
    lora: tuple | None, target: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A [n, r, H], B [n, V, r], index per row or None for "all rows, slot 0", scaling [n]."""
    if lora is None:
        return None, None, None, None
    a, b, index, scaling = lora
    if isinstance(index, int):
        if index == -1:
            return None, None, None, None
        a, b = a[index : index + 1], b[index : index + 1]
        scaling = scaling[index : index + 1] if isinstance(scaling, Tensor) and scaling.dim() else scaling
        index = None
    if not isinstance(scaling, Tensor):
        scaling = torch.full((a.shape[0],), float(scaling), dtype=torch.float32, device=a.device)
    scaling = scaling.detach().to(torch.float32).expand(a.shape[0]).contiguous()
    return a, b, None if index is None else index.reshape(-1), scaling


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    divergence: Collection[str],
    entropy: bool,
    grad_fields: Collection[str] | None,
    save: str,
    valid_rows: int | None,
) -> tuple[str, ...]:
    """Checks everything but values of tensors; returns the names of the fields asked for."""
    _check_tensors({"hidden": hidden, "weight": weight, "target": target})
    for name, x in (("bias", bias), ("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        if x is not None:
            _check_tensors({name: x})
    if hidden.dim() < 1 or not hidden.is_floating_point():
        raise TypeError(f"hidden must be a floating-point tensor [..., H], got {_describe(hidden)}")
    check_target(target, hidden.shape[:-1], hidden.device, "hidden's leading dimensions")
    width = hidden.shape[-1]
    _check_matrix("weight", weight, hidden, (None, width))
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows; the vocabulary must hold at least one token")
    if bias is not None:
        _check_matrix("bias", bias, hidden, (weight.shape[0],))
    check_temperature(temperature, target)
    if softcap is not None and not _is_number(softcap):
        raise TypeError(f"softcap is {softcap!r}; it must be None or a number")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}; it must be None or > 0")
    if not _is_number(logit_scale) or not 0 < abs(logit_scale) < math.inf:
        raise ValueError(f"logit_scale is {logit_scale!r}; it must be a finite number other than 0")
    if isinstance(divergence, str) or set(divergence) - set(DIVERGENCES):
        got = divergence if isinstance(divergence, str) else sorted(set(divergence) - set(DIVERGENCES))
        raise ValueError(f"divergence holds {got!r}; it must be a collection of {', '.join(DIVERGENCES)}")
    if ref_hidden is None and (divergence or ref_weight is not None):
        raise ValueError("ref_hidden is None; divergence and ref_weight need the reference's hidden states")
    if ref_hidden is not None:
        _check_matrix("ref_hidden", ref_hidden, hidden, tuple(hidden.shape))
    if ref_weight is not None:
        _check_matrix("ref_weight", ref_weight, hidden, tuple(weight.shape))
    asked = {"logprob", "lse", *divergence, *(("entropy",) if entropy else ())}
    asked |= {"ref_logprob"} if ref_hidden is not None else set()
    if grad_fields is not None and (isinstance(grad_fields, str) or set(grad_fields) - asked):
        got = grad_fields if isinstance(grad_fields, str) else sorted(set(grad_fields) - asked)
        raise ValueError(f"grad_fields holds {got!r}; it must be a collection of fields asked for: {sorted(asked)}")
    if save not in ("auto", "grad_vector", "recompute", "logits"):
        raise ValueError(f"save is {save!r}; it must be auto, grad_vector, recompute or logits")
    if valid_rows is not None and not 0 <= valid_rows <= target.numel():
        raise ValueError(f"valid_rows is {valid_rows}; it must lie in [0, {target.numel()}], the number of targets")
    return tuple(name for name in FIELDS if name in asked)


def check_target(target: Tensor, shape: torch.Size, device: torch.device, what: str) -> None:
    _check_tensors({"target": target})
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"target has dtype {target.dtype}; it must be int32 or int64")
    if target.shape != shape:
        raise ValueError(f"target has shape {tuple(target.shape)}; it must be {what}, {tuple(shape)}")
    if target.device != device:
        raise ValueError(f"target is on {target.device}; it must be on {device}")


def check_temperature(temperature: float | Tensor, target: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        if not _is_number(temperature):
            raise TypeError(f"temperature is {temperature!r}; it must be a number or a tensor")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be > 0")
        return
    fits = temperature.dim() <= target.dim() and all(
        t in (1, n) for t, n in zip(reversed(temperature.shape), reversed(target.shape))
    )
    if not fits or temperature.device != target.device:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}; "
            f"it must broadcast to target's {tuple(target.shape)} on {target.device}"
        )


def _check_matrix(name: str, x: Tensor, hidden: Tensor, shape: tuple[int | None, ...]) -> None:
    if x.dim() != len(shape) or any(want is not None and got != want for got, want in zip(x.shape, shape)):
        wanted = ", ".join("V" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be [{wanted}]")
    if not x.is_floating_point() or (x.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(f"{name} has dtype {x.dtype}; hidden has {hidden.dtype} (only half and single dtypes may mix)")
    if x.device != hidden.device:
        raise ValueError(f"{name} is on {x.device}; it must be on hidden's {hidden.device}")


def _check_lora(lora: tuple, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple:
    """lora with A and B made 3-D."""
    if not isinstance(lora, (tuple, list)) or len(lora) != 4:
        got = f"has {len(lora)} entries" if isinstance(lora, (tuple, list)) else f"is a {type(lora).__name__}"
        raise ValueError(f"lora {got}; it must be (A, B, adapter_index, scaling)")
    a, b, index, scaling = lora
    _check_tensors({"lora A": a, "lora B": b})
    if a.dim() == 2 and b.dim() == 2:
        a, b = a[None], b[None]
    rank = a.shape[1] if a.dim() == 3 else -1
    _check_matrix("lora A", a, hidden, (a.shape[0], rank, hidden.shape[-1]))
    _check_matrix("lora B", b, hidden, (a.shape[0], weight.shape[0], rank))
    if isinstance(index, Tensor):
        if index.shape != target.shape or index.is_floating_point():
            raise ValueError(
                f"lora: adapter_index is {index.dtype} {tuple(index.shape)}; it must be int {tuple(target.shape)}"
            )
    elif index is None:
        if a.shape[0] != 1:
            raise ValueError(f"lora: adapter_index is None with {a.shape[0]} adapters; it must be given when n > 1")
    elif not -1 <= index < a.shape[0]:
        raise IndexError(f"lora: adapter_index is {index}; it must lie in [-1, {a.shape[0]})")
    if isinstance(scaling, Tensor) and scaling.numel() not in (1, a.shape[0]):
        raise ValueError(f"lora: scaling has {scaling.numel()} entries; it must be a float or one for each adapter")
    return a, b, index, scaling


def _check_values(
    target: Tensor,
    vocabulary: int,
    temperature: float | Tensor,
    ignore_index: int,
    lora: tuple | None,
    valid_rows: int | None,
) -> None:
    """For the definition, which checks no values: what the op checks as it goes."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    flat = target.reshape(-1)
    counted = op.valid_rows_of(flat, ignore_index, -1 if valid_rows is None else valid_rows)
    rows = slice(None) if counted is None else counted
    heat = temperature.broadcast_to(target.shape) if isinstance(temperature, Tensor) else flat.new_ones(flat.shape)
    index = lora[2].reshape(-1)[rows] if lora is not None and isinstance(lora[2], Tensor) else None
    op.check_values(flat[rows], vocabulary, heat.reshape(-1)[rows], index, 0 if lora is None else len(lora[0]))


def _check_tensors(named: dict[str, object]) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
