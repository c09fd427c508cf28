"""Projections of one tensor computed together: q, k and v of an attention, gate and up of a gated MLP.

Siblings are LoRALinears of one module whose names say that they read the same input. The first to be called computes
the later ones too, in one op that reads x once and adds up one dX, and leaves their outputs in the running forward;
each then takes its own. Names only suggest: an output is taken only for the very tensor and parameters it was computed
from, unchanged, so that a sibling called with another tensor, twice or never is right, merely not faster. While
torch.compile traces, which cannot ask what has changed, each is computed by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf_kernels.ops.lora.autograd import apply

if TYPE_CHECKING:
    from rlhf_kernels.nn.lora import LoRALinear
    from rlhf_kernels.nn.routes import Running

# In the order models call them in, which need not be the order of their definition.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


@dataclass
class Ahead:
    """An output computed ahead, and the parameters and numbers it was computed from."""

    y: Tensor
    parameters: list[Any]
    versions: list[int]

    def of(self, parameters: list[Any]) -> bool:
        """Whether it would be computed from the same now."""
        return (
            len(parameters) == len(self.parameters)
            and all(p is q or (type(p) is float and p == q) for p, q in zip(parameters, self.parameters))
            and _versions(parameters) == self.versions
        )


@dataclass
class Pending:
    """The outputs that siblings have not taken yet, and the tensor they were computed from."""

    x: Tensor
    state: tuple[object, ...]
    outputs: dict[Any, Ahead]

    def of(self, x: Tensor) -> bool:
        return self.x is x and self.state == _state(x)


class Sibling(Protocol):
    """A layer that may be computed with others of its module."""

    siblings: list[Any]  # in calling order, itself among them


class Holder(Protocol):
    """Where a forward keeps what siblings have not taken yet."""

    pending: "Pending | None"


def group_siblings(model: nn.Module, fuse: bool = True, kind: type[nn.Module] | None = None) -> None:
    """Tells every LoRALinear (or `kind`) of `model` its siblings, itself among them; with `fuse` off it is alone."""
    from rlhf_kernels.nn.lora import LoRALinear

    kind = kind or LoRALinear
    for module in model.modules():
        if isinstance(module, kind):
            cast(Sibling, module).siblings = [module]
    if not fuse:
        return
    for parent in model.modules():
        for names in SIBLINGS:
            found: list[Any] = [layer for name in names if isinstance(layer := getattr(parent, name, None), kind)]
            if len({layer.in_features for layer in found}) == 1:
                for layer in found:
                    layer.siblings = found


def output(layer: "LoRALinear", x: Tensor, running: "Running") -> Tensor:
    """layer(x): what a sibling computed ahead, or computed together with the siblings that come after it."""
    return together(
        layer, x, running,
        lambda member: member.tensors(running.names),
        lambda members, read: project(members, read, x, running),
    )  # fmt: skip


def together(
    layer: Any,
    x: Tensor,
    holder: Holder,
    read: Callable[[Any], list[Any] | None],
    compute: Callable[[list[Any], list[list[Any]]], list[Tensor]],
) -> Tensor:
    """`output` for any layers: `read(member)` gives all that its output depends on beside x, its weight first and None
    if it cannot be computed with the others; `compute(members, read)` gives the outputs.
    """
    pending, own = holder.pending, read(layer)
    assert own is not None
    again = pending is not None and pending.of(x)
    if pending is not None and layer in pending.outputs:
        if again:
            ahead = pending.outputs.pop(layer)
            if not pending.outputs:
                holder.pending = None
            if ahead.of(own):
                return ahead.y
        else:  # its name misled: it reads another tensor, as in cross-attention
            for member in list(layer.siblings):
                member.siblings = [member]
    members, parts = [layer], [own]
    if not again and not x.is_inference():  # a second call goes alone, and what does not tell that it was written to
        for other in layer.siblings[layer.siblings.index(layer) + 1 :]:
            found = read(other)
            if found is not None and found[0].device == own[0].device and found[0].dtype == own[0].dtype:
                members.append(other)
                parts.append(found)
    ys = compute(members, parts)
    if len(members) > 1:
        ready = {m: Ahead(y, part, _versions(part)) for m, y, part in zip(members[1:], ys[1:], parts[1:])}
        holder.pending = Pending(x, _state(x), ready)
    return ys[0]


def project(
    layers: "Sequence[LoRALinear]", tensors: Sequence[list[Tensor | None]], x: Tensor, running: "Running | None"
) -> list[Tensor]:
    """[layer(x) for layer in layers] by one op, given each one's `tensors`; with no forward running, the base alone."""
    flat = x.reshape(-1, layers[0].in_features)
    rows = flat.shape[0]
    weights = [layer.weight.t() if layer.transposed else layer.weight for layer in layers]
    biases = [own[1] for own in tensors]
    if running is None:
        ys = apply(flat, weights, biases, [], [], None, [0, rows, -1], [])
    else:
        routing = running.routing
        if rows != routing.rows:
            raise ValueError(f"x has {rows} rows where the forward was routed for {routing.rows}")
        lora_a: list[Tensor] = []
        lora_b: list[Tensor] = []
        for layer, (_, _, *own) in zip(layers, tensors):
            for a, b in zip(own[0::2], own[1::2]):
                lora_a.append(flat.new_empty(0, layer.in_features) if a is None else a)
                lora_b.append(flat.new_empty(layer.out_features, 0) if b is None else b)
        ys = apply(
            flat, weights, biases, lora_a, lora_b, routing.index if running.runs is None else None, running.runs,
            running.scaling, grad_rows=routing.grad_rows, order=routing.order,
        )  # fmt: skip
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


def _state(x: Tensor) -> tuple[object, ...]:
    """What else an output of x depends on: writes to x, and the modes the op runs under."""
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    return x._version, torch.is_grad_enabled(), autocast


def _versions(parameters: Sequence[Any]) -> list[int]:
    return [t._version if isinstance(t, Tensor) and not t.is_inference() else -1 for t in parameters]
