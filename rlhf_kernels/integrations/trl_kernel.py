"""What stands where TRL's fused head calls its autograd function: the same call, computed by `linear_logprob`.

TRL's forward stays the one that runs the backbone, shifts the labels and adds up the auxiliary loss. A copy of it whose
globals name this kernel is laid over the model's; only rows that have a label come here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.integrations.trl_metrics import log_sum_sq_probs, mean_logits, top1
from rlhf_kernels.ops.logprob import linear_logprob
from rlhf_kernels.ops.logprob.head import Head, operand, operand_dtype
from rlhf_kernels.ops.registry import no_autocast, under_autocast

KERNEL, COMPACT = "_ChunkedLogProbFunction", "_use_triton"  # what TRL's forward calls them
LAYER = "_rlhf_kernels_layer"  # in a model's __dict__


@dataclass(frozen=True)
class Kernel:
    """Per-token outputs of a head. entropy_grad: whether the entropy carries a gradient, as it does in TRL's."""

    entropy_grad: bool

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """hidden [N, H], weight [V, H], bias [V], target int [N], all of which count.

        Returns log_probs, entropy, log_sum_sq_probs, mean_logits (fp32) and is_top1 (bool), [N]; None what `outputs`
        does not name. `chunk_size` is TRL's and is not used.
        """
        if under_autocast(hidden):  # TRL multiplies in autocast's dtype, too
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with_entropy = "entropy" in outputs or "is_top1" in outputs
        found = linear_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            entropy=with_entropy, valid_rows=len(target),
            grad_fields=("logprob", "entropy") if "entropy" in outputs and self.entropy_grad else ("logprob",),
        )  # fmt: skip
        sums, means, best = None, None, None
        if {"log_sum_sq_probs", "mean_logits", "is_top1"} & set(outputs):
            with torch.no_grad(), no_autocast(hidden):
                head = _head(hidden, weight, bias, target, temperature, softcap, logit_scale)
                if "log_sum_sq_probs" in outputs:
                    sums = log_sum_sq_probs(head, found.lse.detach())
                if "mean_logits" in outputs:
                    means = mean_logits(head)
                if "is_top1" in outputs:
                    assert found.entropy is not None
                    best = top1(head, found.logprob.detach(), found.entropy.detach())
        return found.logprob, found.entropy if "entropy" in outputs else None, sums, means, best


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> Head:
    """The head as the metrics' sweeps see it."""
    dtype = operand_dtype((hidden, weight))
    return Head(
        x=operand(hidden.detach(), dtype), ref=None, weight=weight.detach(), ref_weight=None,
        bias=None if bias is None else bias.detach(), target=target,
        temperature=torch.full(target.shape, temperature, dtype=torch.float32, device=target.device),
        softcap=float(softcap or 0.0), scale=float(logit_scale),
    )  # fmt: skip


@dataclass
class Layer:
    """Ours over the forward that a model had. `on` False hands everything to that one."""

    below: Callable[..., Any]
    forward: MethodType
    on: bool = True


def theirs(model: nn.Module) -> MethodType | None:
    """The forward that TRL's `add_fused_lm_head` gave a model, also from below accelerate's autocast; None if none."""
    for name in ("forward", "_original_forward"):
        forward = model.__dict__.get(name)
        code = getattr(getattr(forward, "__func__", None), "__code__", None)
        if code is not None and code.co_name == "_fused_forward" and {KERNEL, COMPACT} <= set(code.co_names):
            return forward
    return None


def lay(model: nn.Module, forward: MethodType, kernel: Kernel, autocast: Callable[[], AbstractContextManager]) -> None:
    """Lays TRL's `forward` with our kernel over the model's; under `autocast` where it goes past a wrapper that did."""
    below, fused = model.forward, _with_kernel(forward.__func__, kernel)

    def laid(self: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or not layer.on:
            return below(*args, fused_lm_head=fused_lm_head, **kwargs)
        with autocast():
            return fused(self, *args, fused_lm_head=True, **kwargs)

    laid.__wrapped__ = type(model).forward  # type: ignore[attr-defined]  # generate() reads the signature
    layer = Layer(below, MethodType(laid, model))
    model.forward = layer.forward
    model.__dict__[LAYER] = layer


def lift(model: nn.Module) -> None:
    """Undoes `lay`: takes the layer off, or switches it off where something was wrapped around it since."""
    layer: Layer = model.__dict__[LAYER]
    if model.__dict__.get("forward") == layer.forward:
        model.forward = layer.below
        del model.__dict__[LAYER]
    else:
        layer.on = False


def _with_kernel(function: Any, kernel: Kernel) -> Any:
    """TRL's function with other globals: its kernel is ours, which takes the rows that count on every device."""
    names = {KERNEL: kernel, COMPACT: lambda device: True}
    made = FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
