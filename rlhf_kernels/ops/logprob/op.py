"""The registered ops behind `linear_logprob`: forward, backward, their fake kernels and the autograd that joins them.

Both take flat rows [N, ...]. The forward returns every field (empty where not asked for) and what backward needs:
`vectors` (save="grad_vector": d field / d hidden, one a field), or `stats` (fp64 [6, N]) and, for save="logits", z.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob import sweep
from rlhf_kernels.ops.logprob.checks import check_values
from rlhf_kernels.ops.logprob.head import Head, LowRank, Shard, operand, operand_dtype
from rlhf_kernels.ops.registry import no_autocast

RETURNED = ("logprob", "lse", "entropy", "ref_logprob", "kl", "rkl", "js")
NEEDS = ("hidden", "weight", "bias", "lora_a", "lora_b")


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name for name in listed.split(",") if name)


def _vector_dtype(hidden: Tensor, fields: int) -> torch.dtype:
    """A vector is a difference already taken, so bf16 keeps its digits; several may cancel in their sum, and fp16 would
    lose small ones to underflow."""
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and fields == 1 else torch.float32


def valid_rows_of(target: Tensor, ignore_index: int, valid_rows: int) -> Tensor | None:
    """Indices of the rows that count; None means all of them (or unknown, under graph capture)."""
    mask = target != ignore_index
    if target.device.type == "cuda":
        if valid_rows >= 0:
            return None if valid_rows == len(target) else torch.nonzero_static(mask, size=valid_rows).squeeze(1)
        if torch.cuda.is_current_stream_capturing():
            return None
    rows = mask.nonzero().squeeze(1)
    if valid_rows >= 0 and valid_rows != len(rows):
        raise ValueError(f"valid_rows is {valid_rows}, but {len(rows)} targets differ from ignore_index {ignore_index}")
    return None if len(rows) == len(target) else rows


def _low_rank(x: Tensor, a: Tensor | None, b: Tensor | None, index: Tensor | None, scaling: Tensor | None) -> list:
    if a is None or b is None or scaling is None:
        return []
    out = []
    for slot in range(a.shape[0]):
        rows = None if index is None else (index == slot).nonzero().squeeze(1)
        wide = a[slot].float()
        s = (x if rows is None else x[rows]).float() @ wide.t()
        out.append(LowRank(rows, s, wide, b[slot].float(), scaling[slot].float(), slot))
    return out


def _head(
    rows: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_index: Tensor | None,
    lora_scaling: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    tp_group: str,
) -> Head:
    def take(x: Tensor) -> Tensor:
        return x if rows is None else x[rows]

    x, y = take(hidden), take(target).long()
    if row_temperature is None:
        t = torch.full((len(x),), temperature, dtype=torch.float32, device=x.device)
    else:
        t = take(row_temperature).float().contiguous()
    index = None if lora_index is None else take(lora_index)
    shard, vocabulary = Shard.of(tp_group, weight.shape[0], weight.device)
    check_values(y, vocabulary, t, None, index, 0 if lora_a is None else lora_a.shape[0])
    dtype = operand_dtype(m for m in (x, weight, ref_hidden, ref_weight) if m is not None)
    x, ref = operand(x, dtype), None if ref_hidden is None else operand(take(ref_hidden), dtype)
    return Head(
        x=x,
        ref=ref,
        weight=weight.detach(),
        ref_weight=ref_weight,
        bias=bias,
        target=y - shard.offset,
        temperature=t,
        softcap=softcap,
        scale=logit_scale,
        low_rank=_low_rank(x, lora_a, lora_b, lora_index if index is None else index, lora_scaling),
        shard=shard,
    )


def _spread(values: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """Values [..., R] (last dimension the rows that count) over all n rows, 0 elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(*values.shape[:-1], n).index_copy_(values.dim() - 1, rows, values)


def _spread_rows(values: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """The same with the rows first: values [R, H]."""
    return values if rows is None else values.new_zeros(n, values.shape[1]).index_copy_(0, rows, values)


@torch.library.custom_op("rlhf_kernels::linear_logprob", mutates_args=())
def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_index: Tensor | None,
    lora_scaling: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    fields: str,
    grad_fields: str,
    save: str,
    valid_rows: int,
    tp_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, asked, grads = len(target), _names(fields), _names(grad_fields)
    reference = ref_hidden is not None
    with torch.no_grad(), no_autocast(hidden):
        rows = valid_rows_of(target, ignore_index, valid_rows)
        head = _head(
            rows, hidden, weight, target, bias, row_temperature, ref_hidden, ref_weight, lora_a, lora_b, lora_index,
            lora_scaling, temperature, softcap, logit_scale, tp_group,
        )  # fmt: skip
        kept = None
        if save == "logits":
            kept = torch.empty(1 + reference, n, weight.shape[0], dtype=torch.float32, device=hidden.device)
        one_sweep = save == "grad_vector" and grads == ("logprob",)
        full = reference or "entropy" in asked
        need_kl = bool({"kl", "js"} & set(asked))
        view = None
        if kept is not None:
            view, _ = kept[:, : head.rows], kept[:, head.rows :].zero_()
        total, vector = sweep.statistics(head, reference, need_kl, "rkl" in asked, full, one_sweep, view)
        values = {
            "logprob": st.logprob_of(total[st.REST], total[st.TARGET]),
            "lse": total[st.LSE],
            "entropy": total[st.ENTROPY],
            "ref_logprob": st.logprob_of(total[st.REF_REST], total[st.REF_TARGET]),
            "kl": total[st.KL],
            "rkl": total[st.RKL],
        }
        kl_mean = torch.zeros_like(total[st.KL])
        if "js" in asked:
            head.saved = view
            values["js"], kl_mean = sweep.js(head, total[st.LSE], total[st.DIFFERENCE])
        miss = -values["logprob"].expm1()
        stats = torch.stack([total[st.LSE], total[st.DIFFERENCE], total[st.ENTROPY], total[st.KL], kl_mean, miss])
        vectors = hidden.new_empty(0, dtype=_vector_dtype(hidden, len(grads)))
        if save == "grad_vector":
            found = [vector] if one_sweep else _vectors(head, stats, grads)
            vectors = torch.stack([_spread_rows(v.to(vectors.dtype), rows, n) for v in found if v is not None])
        counted = None
        if rows is None and target.device.type == "cuda":
            counted = target != ignore_index
        out = []
        for name in RETURNED:
            value = values[name].float() if name in asked else total.new_empty(0, dtype=torch.float32)
            if name in asked:
                value = _spread(value, rows, n)
                value = value if counted is None else torch.where(counted, value, 0)
            out.append(value.contiguous())
        stats = _spread(stats, rows, n) if save in ("recompute", "logits") else stats.new_empty(0)
        logits = kept if kept is not None else hidden.new_empty(0, dtype=torch.float32)
    return (out[0], out[1], out[2], out[3], out[4], out[5], out[6], stats, vectors, logits)


def _vectors(head: Head, stats: Tensor, grads: tuple[str, ...]) -> list[Tensor | None]:
    """d field / d hidden for each field, by one further sweep a field."""
    named = dict(zip(st.BACKWARD, stats))
    ones = torch.ones_like(stats[0])
    return [sweep.pull(head, named, {name: ones}, {"hidden": None}) for name in grads]


@forward.register_fake
def _(
    hidden, weight, target, bias, row_temperature, ref_hidden, ref_weight, lora_a, lora_b, lora_index, lora_scaling,
    temperature, softcap, logit_scale, ignore_index, fields, grad_fields, save, valid_rows, tp_group,
):  # fmt: skip
    n, asked = target.shape[0], _names(fields)
    out = [hidden.new_empty((n if name in asked else 0,), dtype=torch.float32) for name in RETURNED]
    stats_shape = (len(st.BACKWARD), n) if save in ("recompute", "logits") else (0,)
    vectors_shape = (len(_names(grad_fields)), n, hidden.shape[1]) if save == "grad_vector" else (0,)
    sides = 1 if ref_hidden is None else 2
    logits_shape = (sides, n, weight.shape[0]) if save == "logits" else (0,)
    return (
        *out,
        hidden.new_empty(stats_shape, dtype=torch.float64),
        hidden.new_empty(vectors_shape, dtype=_vector_dtype(hidden, len(_names(grad_fields)))),
        hidden.new_empty(logits_shape, dtype=torch.float32),
    )


@torch.library.custom_op("rlhf_kernels::linear_logprob_backward", mutates_args=())
def backward(
    upstream: Tensor,
    stats: Tensor,
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_temperature: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_index: Tensor | None,
    lora_scaling: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    grad_fields: str,
    needs: str,
    valid_rows: int,
    tp_group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias, lora_a, lora_b), empty where `needs` does not name them; upstream [F, N]."""
    n, wanted = len(target), _names(needs)
    with torch.no_grad(), no_autocast(hidden):
        rows = valid_rows_of(target, ignore_index, valid_rows)
        head = _head(
            rows, hidden, weight, target, bias, row_temperature, ref_hidden, ref_weight, lora_a, lora_b, lora_index,
            lora_scaling, temperature, softcap, logit_scale, tp_group,
        )  # fmt: skip
        if rows is not None:
            upstream, stats = upstream[:, rows], stats[:, rows]
        elif target.device.type == "cuda":
            upstream = torch.where(target == ignore_index, 0, upstream)
        head.saved = logits[:, : head.rows] if logits.numel() else None
        likes = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        whole = ("weight", "bias") if head.rows else ()  # written in every element; an adapter without rows is not
        made = {
            name: torch.empty_like(like) if name in whole else torch.zeros_like(like)
            for name, like in likes.items()
            if name in wanted and like is not None
        }
        need: dict[str, Tensor | None] = {**made, **({"hidden": None} if "hidden" in wanted else {})}
        grads = dict(zip(_names(grad_fields), upstream))
        d_hidden = sweep.pull(head, dict(zip(st.BACKWARD, stats)), grads, need)
        if d_hidden is not None:
            made["hidden"] = _spread_rows(d_hidden.to(hidden.dtype), rows, n)
    out = [made.get(name, hidden.new_empty(0)) for name in NEEDS]
    return (out[0], out[1], out[2], out[3], out[4])


@backward.register_fake
def _(
    upstream, stats, logits, hidden, weight, target, bias, row_temperature, ref_hidden, ref_weight, lora_a, lora_b,
    lora_index, lora_scaling, temperature, softcap, logit_scale, ignore_index, grad_fields, needs, valid_rows, tp_group,
):  # fmt: skip
    likes = dict(zip(NEEDS, (hidden, weight, bias, lora_a, lora_b)))
    wanted = _names(needs)
    return tuple(
        torch.empty_like(likes[name], memory_format=torch.contiguous_format) if name in wanted else hidden.new_empty(0)
        for name in NEEDS
    )


@torch.library.custom_op("rlhf_kernels::linear_logprob_scaled_vectors", mutates_args=())
def scaled_vectors(upstream: Tensor, vectors: Tensor, target: Tensor, like: Tensor, ignore_index: int) -> Tensor:
    """Gradient of hidden in like's dtype: upstream [F, N] times vectors [F, N, H], summed over the fields.

    An op, so that a second derivative is an error: as plain products the vectors would pass for constants, silently.
    """
    total: Tensor | None = None
    for g, vector in zip(upstream, vectors):
        term = torch.where(target == ignore_index, 0, g)[:, None] * vector
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.to(like.dtype)


@scaled_vectors.register_fake
def _(upstream, vectors, target, like, ignore_index):
    return like.new_empty(vectors.shape[1:])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, scalars = inputs[:11], inputs[11:]
    ctx.scalars = scalars
    ctx.save = scalars[6]
    ctx.set_materialize_grads(False)
    stats, vectors, logits = output[7:]
    if ctx.save == "grad_vector":
        ctx.save_for_backward(inputs[0].new_empty(0), inputs[2], vectors)
    elif ctx.save != "none":
        ctx.save_for_backward(*tensors, stats, logits)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple:
    temperature, softcap, logit_scale, ignore_index, _, grad_fields, save, valid_rows, tp_group = ctx.scalars
    given = {name: g for name, g in zip(RETURNED, grads) if g is not None and name in _names(grad_fields)}
    nothing = (None,) * 20
    if not given or save == "none":
        return nothing
    if save == "grad_vector":
        like, target, vectors = ctx.saved_tensors
        names = _names(grad_fields)
        upstream = torch.stack([given.get(name, torch.zeros_like(vectors[0, :, 0])) for name in names])
        return (scaled_vectors(upstream, vectors, target, like, ignore_index), *nothing[1:])
    *tensors, stats, logits = ctx.saved_tensors
    positions = {"hidden": 0, "weight": 1, "bias": 3, "lora_a": 7, "lora_b": 8}
    needs = [name for name, i in positions.items() if ctx.needs_input_grad[i]]
    upstream = torch.stack(list(given.values()))
    made = torch.ops.rlhf_kernels.linear_logprob_backward(
        upstream, stats, logits, *tensors, temperature, softcap, logit_scale, ignore_index, ",".join(given),
        ",".join(needs), valid_rows, tp_group,
    )  # fmt: skip
    out = list(nothing)
    for name, grad in zip(NEEDS, made):
        if name in needs:
            out[positions[name]] = grad
    return tuple(out)


forward.register_autograd(_backward, setup_context=_setup_context)
