"""Adapters on a transformers model: every targeted Linear becomes a LoRALinear, one routing says which row uses which.

transformers passes no keyword to a Linear, so the routing of the running forward lies in one `AdapterRoutes` object a
model, shared by its LoRALinears: set on entry to the model's forward, restored on the way out.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlhf_kernels.ops.lora import Routing
from rlhf_kernels.ops.lora.autograd import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSpec:
    """One adapter: delta W = alpha / r * B A on each targeted Linear. Dropout is always 0 (it is off in every pass)."""

    r: int = 16
    alpha: float = 32.0
    target_modules: str | Sequence[str] | None = None  # None: what the model says; "all-linear"; or names as PEFT's
    dtype: torch.dtype | None = None  # of A and B; None: float32

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r is {self.r!r}; the rank of an adapter must be an int >= 1")
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha!r}; it must be a finite number")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise TypeError(f"dtype is {self.dtype}; an adapter must be floating point")

    @property
    def scaling(self) -> float:
        return self.alpha / self.r


@dataclass
class AdapterRoutes:
    """The adapters of one model, in slot order, and the routing of the forward that is running (None: base only)."""

    specs: dict[str, LoraSpec] = field(default_factory=dict)
    current: Routing | None = None

    def slot(self, name: str | None) -> int:
        """The index of an adapter in a routing; -1, the bypass, for None."""
        return -1 if name is None else list(self.specs).index(name)

    @contextmanager
    def use(self, routing: Routing | None) -> Iterator[None]:
        before, self.current = self.current, routing
        try:
            yield
        finally:
            self.current = before

    def checkpoint(self, run: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
        """torch's checkpoint, with the forward's routing restored while the backward recomputes `run`."""
        routing = self.current
        if use_reentrant:

            def rerouted(*inputs: Any) -> Any:
                with self.use(routing):
                    return run(*inputs)

            return checkpoint(rerouted, *args, use_reentrant=True, **kwargs)
        return checkpoint(
            run, *args, use_reentrant=False, context_fn=lambda: (self.use(routing), self.use(routing)), **kwargs
        )


class LoRALinear(nn.Module):
    """A Linear (or GPT-2 Conv1D) and its adapters. Its own weight and bias keep their names, so checkpoints fit.

    weight [N, K] ([K, N] under Conv1D, used as a transposed view); lora_A[name] [r, K], lora_B[name] [N, r].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base: Any, routes: AdapterRoutes) -> None:
        super().__init__()
        self.transposed = not isinstance(base, nn.Linear)
        self.weight = base.weight
        self.bias = base.bias
        sizes = tuple(base.weight.shape)
        self.out_features, self.in_features = reversed(sizes) if self.transposed else sizes
        self.nf = self.out_features  # Conv1D's name for it, which GPT-2's code may read
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.routes = routes

    def add_adapter(self, name: str, spec: LoraSpec) -> None:
        """A is drawn as PEFT draws it, B is zero: the adapter starts as the base."""
        weight, dtype = self.weight, spec.dtype or torch.float32
        a = torch.empty(spec.r, self.in_features, dtype=torch.float32, device=weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(a.to(dtype))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, spec.r, dtype=dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        routing = self.routes.current
        weight = self.weight.t() if self.transposed else self.weight
        if routing is None:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "the routing of the forward is gone: enable checkpointing with "
                    "HydraModel.gradient_checkpointing_enable, not on the transformers model"
                )
            return F.linear(x, weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        if flat.shape[0] != routing.rows:
            raise ValueError(f"x has {flat.shape[0]} rows where the forward was routed for {routing.rows}")
        names, runs, index = list(self.routes.specs), routing.host_runs(), routing.index
        if runs is not None:
            index = None
            used = sorted({e for e in runs[2::3] if e >= 0 and names[e] in self.lora_A})
            if not used:
                return F.linear(x, weight, self.bias)
            slot = {e: i for i, e in enumerate(used)}
            names = [names[e] for e in used]
            runs = [slot.get(v, -1) if i % 3 == 2 else v for i, v in enumerate(runs)]
        lora_a = [self.lora_A[n] if n in self.lora_A else weight.new_empty(0, self.in_features) for n in names]
        lora_b = [self.lora_B[n] if n in self.lora_B else weight.new_empty(self.out_features, 0) for n in names]
        scaling = [self.routes.specs[n].scaling for n in names]
        (y,) = apply(
            flat, [weight], [self.bias], lora_a, lora_b, index, runs, scaling,
            grad_rows=routing.grad_rows, order=routing.order,
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        ranks = {name: a.shape[0] for name, a in self.lora_A.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={ranks}"


def attach_adapters(
    model: "PreTrainedModel", adapters: Mapping[str, LoraSpec], target_modules: str | Sequence[str] = ALL_LINEAR
) -> AdapterRoutes:
    """Gives `model` adapters, replacing the Linears they target by LoRALinears in place; returns the model's routes.

    Adapters add to those already there. Raises ValueError for a name in use, a target that matches no Linear, or the
    output head as a target.
    """
    routes: AdapterRoutes = getattr(model, "_adapter_routes", None) or AdapterRoutes()
    model._adapter_routes = routes  # type: ignore[assignment]  # a plain attribute, no module
    for name, spec in adapters.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"adapters: {name!r} is no name for an adapter; use letters, digits and _")
        if name in routes.specs:
            raise ValueError(f"adapters: {name!r} is there already; delete it first or choose another name")
        if not isinstance(spec, LoraSpec):
            raise TypeError(f"adapters[{name!r}] is a {type(spec).__name__}; it must be a LoraSpec")
        for path in targeted(model, spec.target_modules or target_modules):
            module = model.get_submodule(path)
            if not isinstance(module, LoRALinear):
                module = LoRALinear(module, routes)
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
            module.add_adapter(name, spec)
        routes.specs[name] = spec
    return routes


def detach_adapter(model: "PreTrainedModel", name: str) -> None:
    """Forgets an adapter; its LoRALinears stay, as plain Linears where no adapter is left."""
    for module in lora_layers(model).values():
        if name in module.lora_A:
            del module.lora_A[name], module.lora_B[name]
    del adapter_routes(model).specs[name]


def adapter_routes(model: "PreTrainedModel") -> AdapterRoutes:
    """The routes `attach_adapters` gave the model."""
    return cast(AdapterRoutes, model._adapter_routes)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinears of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def decoder_linears(model: "PreTrainedModel") -> list[str]:
    """The paths of every Linear and Conv1D inside the decoder layers: what "all-linear" means."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, LoRALinear)
    layers = model.config.get_text_config().num_hidden_layers
    stack = next((p for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None)
    if stack is None:
        raise ValueError(f"{type(model).__name__} has no list of {layers} decoder layers to put adapters on")
    return [p for p, m in model.named_modules() if p.startswith(stack + ".") and isinstance(m, kinds)]


def targeted(model: "PreTrainedModel", target_modules: str | Sequence[str]) -> list[str]:
    """The paths `target_modules` names: "all-linear", or suffixes of paths, as PEFT matches them."""
    everything = decoder_linears(model)
    if target_modules == ALL_LINEAR:
        return everything
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    paths: dict[str, None] = {}
    for name in wanted:
        found = [p for p in everything if p == name or p.endswith("." + name)]
        if not found:
            known = sorted({p.rpartition(".")[2] for p in everything})
            raise ValueError(
                f"target_modules: {name!r} is no Linear of the decoder layers; there are {', '.join(known)} "
                f"(and {ALL_LINEAR!r}); the output head takes no adapter"
            )
        paths.update(dict.fromkeys(found))
    return [p for p in everything if p in paths]


def checkpoint_layers(model: "PreTrainedModel", routes: AdapterRoutes, use_reentrant: bool = False) -> None:
    """Gradient checkpointing of the decoder layers, routing included, without turning dropout on.

    transformers checkpoints a layer in training mode only; the flag is set on the layers themselves and not on what is
    inside them, so that dropout stays off.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    run = partial(routes.checkpoint, use_reentrant=use_reentrant)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=run)
    if use_reentrant:
        model.enable_input_require_grads()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
