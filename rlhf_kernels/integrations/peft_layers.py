"""PEFT's LoRA layer with a forward of our own. An accelerated layer is PEFT's object with its class exchanged for the
one here: parameters, state_dict, hooks, copies and pickles stay what they were, and exchanging it back undoes it all.

Needs PEFT; `rlhf_kernels.integrations.peft` imports this module when it is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraModel as PeftLoraModel
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_kernels.integrations.peft_routes import BASE, Route, Routes, Spread, keep_routes
from rlhf_kernels.ops.lora.autograd import apply
from rlhf_kernels.ops.registry import under_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Factors = tuple[Tensor, Tensor, float]  # A [r, K], B [N, r], scaling


class Linear(PeftLinear):
    """peft.tuners.lora.Linear, whose forward is one call of the fused op. What the op lacks is left to PEFT's."""

    _routes: Routes

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_forward_args(x, adapter_names=names)
        route = self._routes.running() if names is None else self._routes.of_names(names)
        if self.merged and route is not None:
            raise ValueError("route: adapters are merged into the weights; call unmerge_adapter first")
        if self.disable_adapters and self.merged:
            self.unmerge()
        bypass = self.disable_adapters or self.merged
        if not args and not any(v is not None for v in kwargs.values()) and self._base_serves(x):
            if bypass:
                return self._apply(x, [], None)
            factors = self._active() if route is None else self._routed(route)
            if factors is not None:
                return self._apply(x, factors, route)
        if bypass or route is None or names is not None:
            return super().forward(x, *args, adapter_names=names, **kwargs)
        return self._by_names(x, route, *args, **kwargs)

    def _base_serves(self, x: Tensor) -> bool:
        base = self.base_layer
        weight = base.weight
        return (
            is_plain(base)
            and self.cast_input_dtype_enabled
            and type(x) in (Tensor, nn.Parameter)
            and (x.dtype == weight.dtype or under_autocast(x))
            and x.device == weight.device
            and not x.is_meta
        )

    def _factors(self, name: str) -> Factors | None:
        """An adapter as the op takes it; None where only PEFT's forward computes it."""
        if name in self.lora_variant:
            return None
        lora_a, lora_b, dropout, scaling = (
            part[name] for part in (self.lora_A, self.lora_B, self.lora_dropout, self.scaling)
        )
        drops = type(dropout) is not nn.Identity and not (
            type(dropout) is nn.Dropout and (not dropout.training or dropout.p == 0.0)
        )
        if drops or not is_plain(lora_a) or not is_plain(lora_b) or lora_b.bias is not None:
            return None
        if not isinstance(scaling, (int, float)) or lora_a.weight.device != self.base_layer.weight.device:
            return None
        return lora_a.weight, lora_b.weight, float(scaling)

    def _active(self) -> list[Factors] | None:
        """Every active adapter on every row, as one: several are side by side in one of the sum of their ranks."""
        found = [self._factors(name) for name in self.active_adapters if name in self.lora_A]
        factors = [f for f in found if f is not None]
        if len(factors) < len(found):
            return None
        if len(factors) < 2:
            return factors
        scaling = factors[0][2]
        if any(s != scaling for _, _, s in factors):
            factors, scaling = [(a, b * s, 1.0) for a, b, s in factors], 1.0
        return [(torch.cat([a for a, _, _ in factors]), torch.cat([b for _, b, _ in factors], 1), scaling)]

    def _routed(self, route: Route) -> list[Factors] | None:
        """The adapters of the route's slots; of rank 0 where this layer lacks one."""
        weight, factors = self.base_layer.weight, []
        for name in route.adapters:
            if name in self.lora_A:
                found = self._factors(name)
            else:
                found = weight.new_empty(0, self.in_features), weight.new_empty(self.out_features, 0), 1.0
            if found is None:
                return None
            factors.append(found)
        return factors

    def _apply(self, x: Tensor, factors: list[Factors], route: Route | None) -> Tensor:
        base = self.base_layer
        weight = base.weight.t() if type(base) is Conv1D else base.weight
        flat = x.reshape(-1, self.in_features)
        rows = flat.shape[0]
        spread = Spread(None, [0, rows, 0 if factors else -1], None)
        if route is not None and factors:
            spread = route.over(rows, x.device)
        lora_a, lora_b, scaling = ([f[i] for f in factors] for i in range(3))
        (y,) = apply(
            flat, [weight], [base.bias], lora_a, lora_b, spread.index, spread.runs, scaling,
            grad_rows=spread.grad_rows, order=spread.order,
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)

    def _by_names(self, x: Tensor, route: Route, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own computation of a mixed batch, each row a sample."""
        flat = x.reshape(-1, self.in_features)
        names = route.names(flat.shape[0])
        self._check_forward_args(flat, adapter_names=names)
        live = route.over(len(names), flat.device).grad_rows
        live = len(names) if live is None else live
        y = self._mixed_batch_forward(flat[:live], *args, adapter_names=names[:live], **kwargs)
        if live < len(names):
            with torch.no_grad():
                rest = self._mixed_batch_forward(flat[live:], *args, adapter_names=names[live:], **kwargs)
            y = torch.cat([y, rest])
        return y.view(*x.shape[:-1], self.out_features)


class LoraModel(PeftLoraModel):
    """peft.LoraModel, which takes adapter_names in training mode too."""

    _routes: Routes

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None or not self.training or unrouted(self):
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        if kwargs.get("num_beams") not in (None, 1):
            raise ValueError("adapter_names: beam search takes them in eval mode only; call model.eval() first")
        with routed(self, self._routes, Route.of_names(list(names))):
            yield


@contextmanager
def routed(model: nn.Module, routes: Routes, route: Route) -> Iterator[None]:
    """Runs the forwards inside it, and the recomputations of their checkpointed layers, under `route`."""
    there: set[str] = set()
    for module in model.modules():
        keep_routes(module, routes)
        if isinstance(module, Linear):
            there.update(module.lora_A)
    for name in route.adapters:
        if name not in there:
            raise ValueError(f"adapters: {name!r} is on no layer of this model; there are {sorted(there)} and {BASE!r}")
    with routes.use(route):
        yield


def unrouted(model: nn.Module) -> dict[str, str]:
    """What cannot take its rows' adapters from a route, by path."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, Linear):
            found[path] = reason(module) or "it was added later; call accelerate again"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            found[path] = f"PEFT's {type(module).__name__} takes one adapter a forward"
    return found


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is its product and nothing else: no hook, parametrisation or quantised weight."""
    return (
        type(module) in (nn.Linear, Conv1D)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in module.__dict__
        and type(module.weight) in (Tensor, nn.Parameter)
        and module.weight.dtype in DTYPES
    )


def reason(layer: LoraLayer) -> str | None:
    """Why PEFT's own forward serves a layer; None for one that can be accelerated."""
    base = getattr(layer, "base_layer", None)
    if type(layer) not in (PeftLinear, Linear):
        return f"PEFT's {type(layer).__name__} layer is not supported"
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base layer is a {type(base).__name__}, not nn.Linear or Conv1D"
    if type(base.weight) not in (Tensor, nn.Parameter) or base.weight.dtype not in DTYPES:
        return f"its weight is a {type(base.weight).__name__} of {base.weight.dtype}"
    if getattr(base, "_hf_device_mesh", None) is not None:
        return "its base layer is tensor-parallel"
    if "forward" in layer.__dict__:
        return "its forward is replaced already"
    if not any(name not in layer.lora_variant and not layer.lora_bias[name] for name in layer.lora_A):
        kinds = {type(v).__name__ for v in layer.lora_variant.values()} or {"lora_bias"}
        return f"its adapters are no plain LoRA ({', '.join(sorted(kinds))})"
    return None
