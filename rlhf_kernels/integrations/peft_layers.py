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
from rlhf_kernels.nn.siblings import output
from rlhf_kernels.ops.lora.autograd import apply
from rlhf_kernels.ops.registry import under_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Linear(PeftLinear):
    """peft.tuners.lora.Linear, whose forward is one call of the fused op. What the op lacks is left to PEFT's."""

    _routes: Routes
    siblings: "list[Linear]"  # see nn/siblings.py

    @property
    def transposed(self) -> bool:
        return type(self._modules["base_layer"]) is Conv1D

    @staticmethod
    def product(layers: "list[Linear]", parts: list[list[Any]], x: Tensor, route: Route | None) -> list[Tensor]:
        """The outputs of layers that share x, given the parts of each."""
        flat = x.reshape(-1, x.shape[-1])
        rows, n = flat.shape[0], (len(parts[0]) - 2) // 3
        if route is None or n == 0:
            spread = Spread(None, [0, rows, n - 1], None)
        else:
            spread = route.over(rows, x.device)
        weights = [own[0].t() if layer.transposed else own[0] for layer, own in zip(layers, parts)]
        lora_a, lora_b, scaling = [], [], [float(s) for s in parts[0][4::3]]
        for weight, own in zip(weights, parts):
            for a, b in zip(own[2::3], own[3::3]):
                lora_a.append(flat.new_empty(0, weight.shape[1]) if a is None else a)
                lora_b.append(flat.new_empty(weight.shape[0], 0) if b is None else b)
        ys = apply(
            flat, weights, [own[1] for own in parts], lora_a, lora_b, spread.index, spread.runs, scaling,
            grad_rows=spread.grad_rows, order=spread.order,
        )  # fmt: skip
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_forward_args(x, adapter_names=names)
        route = self._routes.running() if names is None else self._routes.of_names(names)
        if self.merged_adapters and route is not None:
            raise ValueError("route: adapters are merged into the weights; call unmerge_adapter first")
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if not args and not any(v is not None for v in kwargs.values()):
            parts = self.parts(route)
            if parts is not None and _fits(x, parts[0]):
                return self._output(x, parts, route)
        if route is None or names is not None or self._disable_adapters:
            return super().forward(x, *args, adapter_names=names, **kwargs)
        return self._by_names(x, route, *args, **kwargs)

    def parts(self, route: Route | None, beside: list[Any] | None = None) -> list[Any] | None:
        """[weight, bias, A, B, scaling, A, B, scaling, ...] of the adapters in force, each slot of a route's with A and
        B None where this layer lacks it. None where only PEFT's forward computes them, or not in one op with `beside`.
        """
        modules: dict[str, Any] = self._modules
        base, on_layer = modules["base_layer"], modules["lora_A"]._modules
        weight = plain_weight(base)
        if weight is None or not self.cast_input_dtype_enabled:
            return None
        found: list[Any] = [weight, base.bias]
        names = self.active_adapters if route is None else route.adapters
        if self._disable_adapters or self.merged_adapters:
            names = ()
        for name in names:
            if name in on_layer:
                factors = self._factors(name)
                if factors is None:
                    return None
                found += factors
            elif route is not None:
                found += (None, None, 1.0)
        return found if beside is None or _alike(found, beside) else None

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """A, B and the scaling of an adapter of this layer; None where only PEFT's forward computes it."""
        modules: dict[str, Any] = self._modules
        lora_a, lora_b, dropout = (modules[k]._modules[name] for k in ("lora_A", "lora_B", "lora_dropout"))
        a, b, scaling = plain_weight(lora_a), plain_weight(lora_b), self.scaling[name]
        drops = dropout.training and dropout.p > 0 if type(dropout) is nn.Dropout else type(dropout) is not nn.Identity
        if drops or a is None or b is None or lora_b.bias is not None or name in self.lora_variant:
            return None
        if not isinstance(scaling, (int, float)):
            return None
        return a, b, scaling

    def _output(self, x: Tensor, parts: list[Any], route: Route | None) -> Tensor:
        if route is None and len(parts) > 5:
            return self.product([self], [_joined(parts)], x, None)[0]
        if torch.compiler.is_compiling():
            return self.product([self], [parts], x, route)[0]
        return output(self, x, self._routes.here if route is None else route, parts)

    def _by_names(self, x: Tensor, route: Route, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's own computation of a mixed batch, each row a sample."""
        flat = x.reshape(-1, x.shape[-1])
        names = route.names(flat.shape[0])
        self._check_forward_args(flat, adapter_names=names)
        live = route.over(len(names), flat.device).grad_rows
        live = len(names) if live is None else live
        y = self._mixed_batch_forward(flat[:live], *args, adapter_names=names[:live], **kwargs)
        if live < len(names):
            with torch.no_grad():
                rest = self._mixed_batch_forward(flat[live:], *args, adapter_names=names[live:], **kwargs)
            y = torch.cat([y, rest])
        return y.view(*x.shape[:-1], y.shape[-1])


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x is what the weight's own product would take."""
    plain = type(x) is Tensor or type(x) is nn.Parameter
    return plain and x.device == weight.device and not x.is_meta and (x.dtype == weight.dtype or under_autocast(x))


def _alike(parts: list[Any], others: list[Any]) -> bool:
    """Whether two layers' parts can be in one op: as many adapters, scaled alike (one that a layer lacks: by 1)."""
    weight, other = parts[0], others[0]
    return weight.device == other.device and weight.dtype == other.dtype and parts[4::3] == others[4::3]


def _joined(parts: list[Any]) -> list[Any]:
    """All adapters on every row, as one: side by side in one of the sum of their ranks."""
    weight, bias, a_list, b_list, scaling = *parts[:2], parts[2::3], parts[3::3], parts[4::3]
    common = scaling[0] if len(set(scaling)) == 1 else 1.0
    b_list = [b if s == common else b * s for b, s in zip(b_list, scaling)]
    return [weight, bias, torch.cat(a_list), torch.cat(b_list, 1), common]


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


def plain_weight(module: nn.Module) -> Tensor | None:
    """The weight, where calling `module` is its product and nothing else: no hook, parametrisation, quantised weight.

    Looks into the module's own dictionaries: attributes of modules are slow, and every layer asks in every forward.
    """
    own = module.__dict__
    if type(module) is not nn.Linear and type(module) is not Conv1D:
        return None
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    weight = own["_parameters"].get("weight", own.get("weight"))  # FSDP makes it a plain attribute
    if "forward" in own or (type(weight) is not nn.Parameter and type(weight) is not Tensor):
        return None
    return weight if weight.dtype in DTYPES else None


def reason(layer: LoraLayer) -> str | None:
    """Why PEFT's own forward serves a layer; None for one that can be accelerated."""
    base: Any = getattr(layer, "base_layer", None)
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
