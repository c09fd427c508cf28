"""The public `linear_logprob`: argument checks, the choice of what backward is left, and the derived estimators."""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob import naive, op
from rlhf_kernels.ops.logprob.checks import check_arguments, check_lora, check_values
from rlhf_kernels.ops.logprob.native import HALF_AND_SINGLE
from rlhf_kernels.ops.logprob.outputs import FIELDS, SAMPLED, LinearLogprobOutput, sampled_estimator

Save = Literal["auto", "grad_vector", "recompute", "logits"]

registry.serves("linear_logprob", "native", ("cpu", "cuda", "meta"), HALF_AND_SINGLE)  # meta: a memory plan
registry.serves("linear_logprob", "triton", registry.triton_devices(), HALF_AND_SINGLE)


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
        deterministic: results are bitwise repeatable in any case (no atomics). On the CPU's tiles (docs/kernels.md) a
            bf16 row also has the same bits alone and among any other rows; elsewhere a library's GEMM may take another
            kernel for another number of rows, and that holds up to rounding.
        tp_group: process group over which the vocabulary is sharded; outputs are those of the whole vocabulary, and
            the gradient of `hidden` is summed over the ranks.

    Returns:
        LinearLogprobOutput, fp32 fields in target's shape, None where not asked for.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown names, temperature <= 0, save="grad_vector" when more
            than `hidden` needs a gradient. IndexError: a target or adapter index out of range (tensors'
            values on the CPU, elsewhere with RLHF_KERNELS_CHECK=1).

    Differentiable once: a second derivative raises RuntimeError (float64, which autograd differentiates, excepted).

    Source: the formulas above; k1, k2, k3: Schulman, "Approximating KL divergence", 2020.
    """
    names = check_arguments(
        hidden, weight, target, bias, temperature, softcap, logit_scale, ref_hidden, ref_weight, divergence, entropy,
        grad_fields, save, valid_rows, tp_group is not None,
    )  # fmt: skip
    carried = names if grad_fields is None else tuple(name for name in names if name in grad_fields)
    if lora is not None:
        lora = check_lora(lora, hidden, weight, target)
    if registry.choose("linear_logprob", hidden) == "naive" and tp_group is None:
        candidates = (weight, bias, *(lora or ())[:2])
        _resolve_save(save, hidden, [x for x in candidates if x is not None and x.requires_grad], ())
        _check_definition_values(target, weight.shape[0], temperature, ignore_index, lora, valid_rows)
        with registry.no_autocast(hidden):
            found = naive.linear_logprob(
                hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
                ignore_index=ignore_index, entropy=entropy, ref_hidden=ref_hidden, ref_weight=ref_weight,
                divergence=divergence, lora=lora, grad_fields=carried,
            )  # fmt: skip
        return LinearLogprobOutput(**{n: f.float() for n, f in zip(FIELDS, found) if f is not None})

    rows, width = target.numel(), hidden.shape[-1]
    a, b, index, scaling = _lora_tensors(lora)
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
    if lora is not None and a is None and torch.is_grad_enabled():  # bypassed: adapters get gradients of 0
        zero = lora[0][:0].sum(dtype=torch.float32) + lora[1][:0].sum(dtype=torch.float32)
        fields = {name: value + zero for name, value in fields.items()} if zero.requires_grad else fields
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
    lora: tuple | None,
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


def _check_definition_values(
    target: Tensor,
    vocabulary: int,
    temperature: float | Tensor,
    ignore_index: int,
    lora: tuple | None,
    valid_rows: int | None,
) -> None:
    """For the definition, which checks no values: what the op checks as it goes."""
    if not registry.checks_values(target):
        return
    flat = target.reshape(-1)
    counted = op.valid_rows_of(flat, ignore_index, -1 if valid_rows is None else valid_rows)
    rows = slice(None) if counted is None else counted
    heat = temperature.broadcast_to(target.shape) if isinstance(temperature, Tensor) else flat.new_ones(flat.shape)
    index = lora[2].reshape(-1)[rows] if lora is not None and isinstance(lora[2], Tensor) else None
    adapters = 0 if lora is None else len(lora[0])
    check_values(flat[rows], vocabulary, heat.reshape(-1)[rows], None, index, adapters)
