"""Projections of one tensor computed together: q, k and v of an attention, gate and up of a gated MLP.

Siblings are LoRALinears of one module whose names say that they read the same input. The first to be called computes
the later ones too, in one op that reads x once and adds up one dX, and leaves their outputs in the running forward;
each then takes its own. Names only suggest: an output is taken only for the very tensor and parameters it was computed
from, unchanged, so that a sibling called with another tensor, twice or never is right, merely not faster. While
torch.compile traces, which cannot ask what has changed, each is computed by itself. Siblings are one node of autograd's
graph: who differentiates two of them in turn must retain it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf_kernels.ops.lora.autograd import apply
from rlhf_kernels.ops.registry import under_autocast

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


@dataclass(slots=True)
class Ahead:
    """An output computed ahead, and the parameters it was computed from."""

    y: Tensor
    tensors: list[Any]  # Forward.read
    versions: list[int]


@dataclass(slots=True)
class Pending:
    """The outputs that siblings have not taken yet, and the tensor they were computed from."""

    x: Tensor
    state: tuple[object, ...]
    outputs: dict[Any, Ahead]


class Forward(Protocol):
    """A forward that is under way, of layers that have `siblings`: LoRALinears or others."""

    pending: Pending | None

    def read(self, layer: Any, beside: list[Any] | None = None) -> list[Any] | None:
        """All that an output depends on beside x, as objects that stay the same while nothing changes; None where it
        cannot be computed together with what was read as `beside`.
        """

    def compute(self, layers: list[Any], read: list[list[Any]], x: Tensor) -> list[Tensor]:
        """The outputs of layers that share x."""


def group_siblings(model: nn.Module, fuse: bool = True, kind: type[Any] | None = None) -> None:
    """Tells every LoRALinear (or `kind`) of `model` its siblings, itself among them; with `fuse` off it is alone."""
    from rlhf_kernels.nn.lora import LoRALinear

    kind = kind or LoRALinear
    for parent in model.modules():
        for names in SIBLINGS:
            found = [layer for name in names if isinstance(layer := getattr(parent, name, None), kind)]
            alike = len({(layer.in_features, layer.transposed) for layer in found}) == 1
            for layer in found:
                layer.siblings = found if fuse and alike else [layer]


def output(layer: Any, x: Tensor, running: Forward, own: list[Any] | None = None) -> Tensor:
    """layer(x): what a sibling computed ahead, or computed together with the siblings that come after it. `own` is what
    running.read(layer) gives, where it is known.
    """
    if own is None:
        own = cast(list[Any], running.read(layer))
    siblings = layer.siblings
    if len(siblings) == 1 or x.is_inference():  # inference_mode's tensors do not tell when they are written to
        return running.compute([layer], [own], x)[0]
    pending, state = running.pending, _state(x)
    members, tensors = [layer], [own]
    if pending is not None and pending.x is x and pending.state == state:
        ahead = pending.outputs.pop(layer, None)
        if not pending.outputs:
            running.pending = None
        if ahead is not None and all(map(is_, own, ahead.tensors)) and _versions(own) == ahead.versions:
            return ahead.y
    elif pending is not None and layer in pending.outputs:  # its name misled: it reads another tensor, as in
        for member in list(siblings):  # cross-attention
            member.siblings = [member]
    else:
        for other in siblings[siblings.index(layer) + 1 :]:
            found = running.read(other, own)
            if found is not None:
                members.append(other)
                tensors.append(found)
    ys = running.compute(members, tensors, x)
    if len(members) > 1:
        ready = {m: Ahead(y, t, _versions(t)) for m, y, t in zip(members[1:], ys[1:], tensors[1:])}
        running.pending = Pending(x, state, ready)
    return ys[0]


def project(
    layers: "Sequence[LoRALinear]", tensors: Sequence[list[Tensor | None]], x: Tensor, running: "Running | None"
) -> list[Tensor]:
    """[layer(x) for layer in layers] by one op, given each one's `tensors`; with no forward running, the base alone."""
    shape = x.shape
    flat = x if len(shape) == 2 else x.reshape(-1, layers[0].in_features)
    rows = flat.shape[0]
    weights = [cast(Tensor, own[0]) for own in tensors]
    if layers[0].transposed:
        weights = [weight.t() for weight in weights]
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
            flat, weights, biases, lora_a, lora_b, running.index, running.runs,
            running.scaling, grad_rows=routing.grad_rows, order=routing.order,
        )  # fmt: skip
    return ys if flat is x else [y.view(*shape[:-1], y.shape[-1]) for y in ys]


def _state(x: Tensor) -> tuple[object, ...]:
    """What else an output of x depends on: writes to x, and the modes the op runs under."""
    autocast = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else None
    return x._version, torch.is_grad_enabled(), autocast


def _versions(read: Sequence[Any]) -> list[int]:
    return [t._version if isinstance(t, Tensor) and not t.is_inference() else -1 for t in read]
