"""Gated MLPs, down(silu(gate(x)) * up(x)), that keep gate and up for the backward and nothing made of them.

Autograd keeps silu(gate) for the product's gradient and the product for that of down's adapters: as many bytes again as
gate and up. Here both are made anew, from the same values by the same operations, so that no gradient changes by a bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def frugal_mlps(model: Any) -> Iterator[None]:
    """The gated MLPs of a transformers model, as far as they are built like Llama's, keep less inside.

    Not without gradients, under torch.compile or with checkpointed layers, which keep nothing anyhow.
    """
    mlps = []
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        modules = list(model.modules())
        if not any(getattr(module, "gradient_checkpointing", False) for module in modules):
            mlps = [module for module in modules if _is_gated(module)]
    own = {mlp: partial(_forward, mlp) for mlp in mlps}
    for mlp, forward in own.items():
        mlp.__dict__["forward"] = forward
    try:
        yield
    finally:
        for mlp, forward in own.items():
            if mlp.__dict__.get("forward") is forward:
                del mlp.__dict__["forward"]


def _is_gated(module: nn.Module) -> bool:
    """Whether calling the module is what `_forward` does: its code is that of Llama's MLP, its activation SiLU."""
    code = getattr(type(module).forward, "__code__", None)
    return (
        code is not None
        and _same_code(code, _llama_code())
        and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and "forward" not in module.__dict__
    )


@cache
def _llama_code() -> CodeType:
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP.forward.__code__


def _same_code(one: CodeType, other: CodeType) -> bool:
    return (one.co_code, one.co_names, one.co_consts) == (other.co_code, other.co_names, other.co_consts)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if gate.dtype != up.dtype or not (gate.requires_grad and up.requires_grad):
        return mlp.down_proj(mlp.act_fn(gate) * up)
    product = _Product.apply(gate, up)
    storage, again = product.untyped_storage()._cdata, (gate.detach(), up.detach())

    def pack(kept: Tensor) -> "Tensor | _View":
        if kept.untyped_storage()._cdata != storage:
            return kept
        return _View(*again, tuple(kept.shape), kept.stride(), int(kept.storage_offset()))

    with saved_tensors_hooks(pack, lambda kept: kept.product() if isinstance(kept, _View) else kept):
        return mlp.down_proj(product)


class _Product(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        return to_gate, F.silu(gate).mul_(grad)


@dataclass
class _View:
    """A view of silu(gate) * up, which is not kept."""

    gate: Tensor
    up: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def product(self) -> Tensor:
        with torch.no_grad():
            return F.silu(self.gate).mul_(self.up).as_strided(self.shape, self.stride, self.offset)
