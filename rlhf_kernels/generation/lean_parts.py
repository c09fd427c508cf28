"""What stands in for a decoder's modules in a generation step on the CPU: linears, MLPs, RMS norms, attentions, layers.

Each does what its module's forward does, on packed rows without gradients, in fewer passes: projections of one tensor
in one product, norms and gates in one loop, rotary embedding on the way into the KV arena. `lean.py` decides which
modules have one, and proves each against its module first. Parameters are read from the modules at every call.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.integrations.transformers import SlicedRows
from rlhf_kernels.nn.lora import LoRALinear
from rlhf_kernels.nn.siblings import project
from rlhf_kernels.ops.lora.tiles import ADAPTER_DTYPES

Projections = Callable[[Tensor], list[Tensor]]  # x [rows, K] -> [rows, N_p] of each
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
ATTENTION_READS = {  # what the forward of an attention may mention: a name beyond these may mean a step beyond these
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "config",
    "attn_logit_softcapping", "contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim",
    "layer_idx", "reshape", "scaling", "shape", "sliding_window", "training", "transpose", "update", "view",
}  # fmt: skip
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
NORM_STYLES = ((0.0, True), (1.0, False), (0.0, False))  # what is added to the weight; whether x / rms(x) is rounded


class Part:
    """A replacement: `module`, the `inner` modules it reads, the `parts` it is made of; called like the module."""

    __call__: Callable[..., Any]

    def __init__(self, module: nn.Module, inner: Sequence[nn.Module] = (), parts: Sequence["Part"] = ()) -> None:
        self.module, self.inner, self.parts = module, tuple(inner), tuple(parts)
        self._children = [(m, list(m._modules.values())) for m in (module, *inner)]
        self._kinds = [type(m) for m in (module, *inner)]

    def current(self) -> bool:
        """Whether the modules still have the children it was made for, and are of the kinds it was made for (a
        parametrization changes a module's class)."""
        children = (all(map(is_, before, module._modules.values())) for module, before in self._children)
        return all(children) and all(map(is_, self._kinds, map(type, (self.module, *self.inner))))

    def serves(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it takes this call; else the module's own forward does."""
        return True

    def variants(self) -> Sequence[Any]:
        """Ways it may have to work; `choose` takes the one that proves right."""
        return (None,)

    def choose(self, variant: Any, probe: Any) -> None:
        """`probe` has seen the module's own call."""


class LeanLinear(Part):
    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.project, self.width = projections([module]), module.out_features

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0:  # no row's logits are wanted
            return x.new_empty(*x.shape[:-1], self.width)
        return self.project(x.reshape(-1, x.shape[-1]))[0].view(*x.shape[:-1], self.width)


class LeanNorm(Part):
    """x / sqrt(mean x^2 + eps) times the weight, or 1 + weight."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        super().__init__(module)
        self.eps = eps
        self.offset, self.round_first = NORM_STYLES[0]

    @property
    def size(self) -> int:
        weight: Any = self.module.weight
        return weight.numel()

    def variants(self) -> Sequence[Any]:
        return NORM_STYLES

    def choose(self, variant: Any, probe: Any) -> None:
        self.offset, self.round_first = variant

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.module._parameters["weight"]
        rows = x.reshape(-1, x.shape[-1])
        return torch.ops.rlhf_kernels.rms_norm_rows(rows, weight, self.eps, self.offset, self.round_first).view(x.shape)


class LeanMLP(Part):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, module: Any) -> None:
        gate, up, down, act = module.gate_proj, module.up_proj, module.down_proj, module.act_fn
        super().__init__(module, (gate, up, down, act))
        self.open, self.down = projections([gate, up]), projections([down])
        self.act = None if type(act).__name__ in ("SiLU", "SiLUActivation") else act

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.open(x.reshape(-1, x.shape[-1]))
        if self.act is None:
            torch.ops.rlhf_kernels.silu_mul(gate, up)
        else:
            gate = self.act(gate).mul_(up)
        return self.down(gate)[0].view(x.shape)


class LeanAttention(Part):
    """q, k, v; norms of heads, where there are any; rotation of halves; attention over the arena; output."""

    def __init__(self, module: Any, norms: Sequence[LeanNorm]) -> None:
        linears = [module.q_proj, module.k_proj, module.v_proj, module.o_proj]
        super().__init__(module, (*linears, *(norm.module for norm in norms)))
        self.layer, self.head_dim = module.layer_idx, module.head_dim
        self.enter, self.leave, self.norms = projections(linears[:3]), projections(linears[3:]), norms
        self.options: dict[str, Any] = {}

    def variants(self) -> Sequence[Any]:
        return NORM_STYLES if self.norms else (None,)

    def choose(self, variant: Any, probe: Any) -> None:
        self.options = probe.options[self.layer]
        for norm in self.norms:
            norm.choose(variant, probe)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        packed: SlicedRows,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        x = hidden_states[0]
        tokens = x.shape[0]
        q, k, v = (y.view(tokens, -1, self.head_dim) for y in self.enter(x))
        if self.norms:
            q, k = (norm(y) for norm, y in zip(self.norms, (q, k)))
        cos, sin = position_embeddings
        out = packed.rotate_and_attend(self.layer, q, k, v, cos[0], sin[0], **self.options)
        return self.leave(out.view(tokens, -1))[0].unsqueeze(0), None


class LeanLayer(Part):
    """x + attention(norm(x)), and that + mlp(norm(that)), without a module's call for each."""

    def __init__(self, module: Any, parts: Mapping[str, Any]) -> None:
        super().__init__(
            module, [inner for part in parts.values() for inner in (part.module, *part.inner)], [*parts.values()]
        )
        self.norm, self.attention = parts["input_layernorm"], parts["self_attn"]
        self.second_norm, self.mlp = parts["post_attention_layernorm"], parts["mlp"]

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        packed: SlicedRows,
        **kwargs: Any,
    ) -> Tensor:
        x, _ = self.attention(self.norm(hidden_states), position_embeddings, packed=packed)
        x.add_(hidden_states)
        return self.mlp(self.second_norm(x)).add_(x)


def projections(modules: Sequence[nn.Module]) -> Projections:
    """One call for modules that read the same tensor: one product where they are plain Linears, or LoRALinears."""
    if all(type(module) is nn.Linear for module in modules):
        return _linears(modules)
    if all(type(module) is LoRALinear for module in modules) and len({id(m.routes) for m in modules}) == 1:
        return _routed(modules)
    return lambda x: [module(x) for module in modules]


def _linears(modules: Sequence[Any]) -> Projections:
    owned = [module._parameters for module in modules]
    widths = [module.out_features for module in modules]
    biased = any(module.bias is not None for module in modules)

    def run(x: Tensor) -> list[Tensor]:
        rows = x.shape[0]
        ys = [x.new_empty(rows, width) for width in widths]
        biases = [x.new_empty(0) if own["bias"] is None else own["bias"] for own in owned] if biased else []
        weights = [own["weight"] for own in owned]
        torch.ops.rlhf_kernels.lora_tiles(x, weights, biases, [], [], None, [0, rows, -1], [], ys, None)
        return ys

    return run


def _routed(modules: Sequence[Any]) -> Projections:
    """The same beside the adapters of the running forward; `project` where the op cannot take them as they lie."""
    routes, features = modules[0].routes, modules[0].in_features
    widths = [module.out_features for module in modules]
    biased = any(module.bias is not None for module in modules)

    def run(x: Tensor) -> list[Tensor]:
        running, rows = routes.running, x.shape[0]
        names, runs, scaling = [], [0, rows, -1], []
        if running is not None:
            names, runs, scaling = running.names, running.runs, running.scaling
        found = [module.tensors(names) for module in modules]
        a = [x.new_empty(0, features) if t is None else t for own in found for t in own[2::2]]
        b = [x.new_empty(w, 0) if t is None else t for own, w in zip(found, widths) for t in own[3::2]]
        if runs is None or runs[-2] != rows or not all(t.dtype in ADAPTER_DTYPES and t.is_contiguous() for t in a + b):
            return project(modules, found, x, running)
        ys = [x.new_empty(rows, width) for width in widths]
        biases = [x.new_empty(0) if own[1] is None else own[1] for own in found] if biased else []
        torch.ops.rlhf_kernels.lora_tiles(x, [own[0] for own in found], biases, a, b, None, runs, scaling, ys, None)
        return ys

    def projected(x: Tensor) -> list[Tensor]:
        running = routes.running
        names = [] if running is None else running.names
        return project(modules, [module.tensors(names) for module in modules], x, running)

    return projected if any(module.transposed for module in modules) else run
