"""Adapters on a transformers model: every targeted Linear becomes a LoRALinear, one routing says which row uses which.

The routing of the running forward lies in one `AdapterRoutes` object a model, shared by its LoRALinears.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_kernels.nn.routes import AdapterRoutes
from rlhf_kernels.nn.shards import is_sharded
from rlhf_kernels.nn.siblings import group_siblings, output, project

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSpec:
    """One adapter: delta W = scaling * B A on each targeted Linear. Dropout is always 0 (it is off in every pass)."""

    r: int = 16
    alpha: float = 32.0
    target_modules: str | Sequence[str] | None = None  # None: what the model says; "all-linear"; or names as PEFT's
    dtype: torch.dtype | None = None  # of A and B; None: float32
    use_rslora: bool = False  # scaling is alpha / sqrt(r), not alpha / r
    rank_pattern: Mapping[str, int] | None = (
        None  # other ranks of some layers, by path or its end; scaling stays that of r
    )

    def __post_init__(self) -> None:
        for name, r in (("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in (self.rank_pattern or {}).items())):
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                raise ValueError(f"{name} is {r!r}; the rank of an adapter must be an int >= 1")
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha!r}; it must be a finite number")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise TypeError(f"dtype is {self.dtype}; an adapter must be floating point")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def rank(self, path: str) -> int:
        """The rank on the layer at a path: the first pattern that is its path or the end of it, else r."""
        found = (r for key, r in (self.rank_pattern or {}).items() if path == key or path.endswith("." + key))
        return next(found, self.r)


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
        self.register_parameter("bias", base.bias)
        sizes = tuple(base.weight.shape)
        self.out_features, self.in_features = reversed(sizes) if self.transposed else sizes
        self.nf = self.out_features  # Conv1D's name for it, which GPT-2's code may read
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.routes = routes
        self.siblings = [self]  # see nn/siblings.py

    def add_adapter(self, name: str, spec: LoraSpec, r: int) -> None:
        """A is drawn as PEFT draws it, B is zero: the adapter, here of rank r, starts as the base."""
        weight, dtype = self.weight, spec.dtype or torch.float32
        a = torch.empty(r, self.in_features, dtype=torch.float32, device=weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(a.to(dtype))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        running = self.routes.running
        if torch.compiler.is_compiling():
            return project([self], [self.tensors([] if running is None else running.names)], x, running)[0]
        if running is not None:
            return output(self, x, running)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "the routing of the forward is gone: enable checkpointing with "
                "HydraModel.gradient_checkpointing_enable, not on the transformers model"
            )
        return project([self], [self.tensors([])], x, None)[0]

    def tensors(self, names: Sequence[str]) -> list[Tensor | None]:
        """[weight, bias, A, B, A, B, ...] of the adapters named, None for one that is not on this layer."""
        own, parts = self._parameters, self._modules  # not by attribute: this is most of a decode step's Python
        if len(own) == 2:
            found: list[Tensor | None] = [own["weight"], own["bias"]]
        else:  # parametrised, or sharded by something that keeps a plain tensor in a parameter's place
            found = [self.weight, self.bias]
        lora_a, lora_b = cast(nn.Module, parts["lora_A"])._parameters, cast(nn.Module, parts["lora_B"])._parameters
        for name in names:
            found += (lora_a.get(name), lora_b.get(name))
        return found

    def extra_repr(self) -> str:
        ranks = {name: a.shape[0] for name, a in self.lora_A.items()}
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={ranks}"


def attach_adapters(
    model: "PreTrainedModel",
    adapters: Mapping[str, LoraSpec],
    target_modules: str | Sequence[str] = ALL_LINEAR,
    fuse: bool = True,
) -> AdapterRoutes:
    """Gives `model` adapters, replacing the Linears they target by LoRALinears in place; returns the model's routes.

    Adapters add to those already there. `fuse`: projections that read one tensor (q, k and v; gate and up) are computed
    together, which changes no name, and no value beyond rounding.
    Raises ValueError for a name in use, a target that matches no Linear, or the output head as a target.
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
        paths = targeted(model, spec.target_modules or target_modules)
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, LoRALinear) and is_sharded(cast(Tensor, module.weight)):
                # FSDP knows the module that it sharded, and would not gather for another in its place
                raise ValueError(f"adapters: {path} has had none and is sharded by now; attach adapters before `shard`")
        for key in spec.rank_pattern or {}:
            if not any(path == key or path.endswith("." + key) for path in paths):
                raise ValueError(f"adapters[{name!r}]: rank_pattern names {key!r}, which is none of its layers")
        for path in paths:
            _adaptable(model, path, routes).add_adapter(name, spec, spec.rank(path))
        routes.specs[name] = spec
    group_siblings(model, fuse)
    return routes


def match_layers(model: "PreTrainedModel", other: "PreTrainedModel", fuse: bool = True) -> None:
    """LoRALinears, without adapters, wherever `other` has them, so that equal weights give equal bits in both."""
    linears = set(decoder_linears(model))
    for path in lora_layers(other):
        if path in linears:
            _adaptable(model, path, adapter_routes(model))
    group_siblings(model, fuse)


def _adaptable(model: nn.Module, path: str, routes: AdapterRoutes) -> LoRALinear:
    """The LoRALinear at a path, put in the place of a Linear if need be."""
    module = model.get_submodule(path)
    if not isinstance(module, LoRALinear):
        module = LoRALinear(module, routes)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return module


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


def decoder_layers(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's decoder layers. ValueError where it has no such list."""
    layers = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return path, module
    raise ValueError(f"{type(model).__name__} has no list of {layers} decoder layers")


def decoder_linears(model: "PreTrainedModel") -> list[str]:
    """The paths of every Linear and Conv1D inside the decoder layers: what "all-linear" means."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, LoRALinear)
    stack, _ = decoder_layers(model)
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
