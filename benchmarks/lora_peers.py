"""The ways others compute a linear with adapters, each loaded on the same inputs (`lora_layer.Inputs`).

A loader raises `Unavailable` where its library is missing or where it does not do the work. Parameters are each
contestant's own copies, in the order of `Linear.parameters`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.case import OURS, Unavailable
from benchmarks.lora_layer import SCALING, Inputs, Linear
from benchmarks.peers import attribute
from rlhf_kernels import build_routing, lora_linear

Loader = Callable[[Inputs], Linear]

OURS_FP32 = f"{OURS}, fp32 adapters"
FROZEN = "frozen linear"
EAGER = "eager"
ADDMM = "addmm autograd"
LOOP = "loop over adapters"
GATHERED = "shrink/expand"
PEFT = "PEFT"
PEFT_LOW = "PEFT, bf16 adapters"
PEFT_MIXED = "PEFT, adapter_names"
PEFT_PASSES = "PEFT, three passes"
PEFT_LOW_PASSES = "PEFT, bf16 adapters, three passes"
PEFT_SWITCHED = "PEFT, three passes and set_adapter"


def frozen(inputs: Inputs) -> Linear:
    return Linear(lambda x: F.linear(x, inputs.weight))


def ours(inputs: Inputs, dtype: torch.dtype | None = None) -> Linear:
    """The routing is made once a batch for all of a model's layers, so it is ready before the clock starts."""
    a, b = inputs.matrices(dtype)
    routing = None if inputs.index is None else build_routing(inputs.index, len(a))
    return Linear(lambda x: lora_linear(x, inputs.weight, a, b, scaling=SCALING, routing=routing), (*a, *b))


def eager(inputs: Inputs) -> Linear:
    """The formula in PyTorch, for one adapter."""
    (a,), (b,) = _one(inputs)
    return Linear(lambda x: F.linear(x, inputs.weight) + F.linear(F.linear(x, a), b) * SCALING, (a, b))


def loop_over_adapters(inputs: Inputs) -> Linear:
    """Each adapter's rows gathered, computed apart and added; which rows those are is known beforehand."""
    a, b = inputs.matrices()
    assert inputs.index is not None
    places = [(inputs.index == e).nonzero().squeeze(-1) for e in range(len(a))]

    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, inputs.weight)
        for where, down, up in zip(places, a, b):
            if len(where):
                y = y.index_add(0, where, F.linear(F.linear(x[where], down), up) * SCALING)
        return y

    return Linear(forward, (*a, *b))


class _Accumulating(torch.autograd.Function):
    """The adapter's products accumulated into the base GEMM's output by the library, nothing written twice.

    As fast single-adapter trainers order them: y = x W^T, then y += s (B t)^T with s = x A^T and t the scaling; going
    back g = dY B t, dX = dY W, then dX += g A, dA = g^T x, dB = dY^T s t.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        y = x @ weight.t()
        s = x @ a.t()
        y.addmm_(s, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, s)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, s = ctx.saved_tensors
        g = (upstream @ b).mul_(ctx.scaling)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = upstream @ weight
            dx.addmm_(g, a)
        return dx, None, g.t() @ x, (upstream.t() @ s).mul_(ctx.scaling), None


def addmm(inputs: Inputs) -> Linear:
    (a,), (b,) = _one(inputs)
    return Linear(lambda x: _Accumulating.apply(x, inputs.weight, a, b, SCALING), (a, b))


def shrink_expand(inputs: Inputs) -> Linear:
    """As serving engines apply the adapters of a batch's rows: A x of every row's own adapter into an fp32 buffer, then
    B of that added to the base's output. On a GPU two Triton kernels that skip rows without an adapter; elsewhere the
    rows' matrices gathered, a matrix of zeros for rows without.
    """
    index = inputs.index
    if index is None:
        index = torch.zeros(len(inputs.x), dtype=torch.int64, device=inputs.x.device)
    if inputs.x.is_cuda:
        from benchmarks.lora_triton import add_expanded, shrink

        def on_gpu(x: Tensor) -> Tensor:
            y = F.linear(x, inputs.weight)
            return add_expanded(y, shrink(x, inputs.a, index), inputs.b, index, SCALING)

        return Linear(on_gpu, trains=False)
    a, b = (torch.cat([side, torch.zeros_like(side[:1])]) for side in (inputs.a, inputs.b))  # -1 is the last: zeros

    def gathered(x: Tensor) -> Tensor:
        y = F.linear(x, inputs.weight)
        buffer = torch.einsum("mk,mrk->mr", x, a[index]).float()
        return y.add_(torch.einsum("mr,mnr->mn", buffer.to(x.dtype), b[index]), alpha=SCALING)

    return Linear(gathered, trains=False)


def _one(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    if inputs.index is not None:
        raise Unavailable("one adapter only")
    return inputs.matrices()


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def peft_layer(inputs: Inputs, names: list[str], autocast: bool) -> Any:
    """PEFT's own layer around the frozen weight, `names` being the adapters, with their matrices set to ours.

    `autocast` as PEFT's `autocast_adapter_dtype`: adapters in fp32, and so the activations they see.
    """
    config_class, linear_class = attribute("peft", "LoraConfig"), attribute("peft.tuners.lora", "Linear")
    cast = attribute("peft.tuners.tuners_utils", "cast_adapter_dtype")
    r = inputs.a.shape[1]
    config = config_class(r=r, lora_alpha=SCALING * r)
    base = nn.Linear(1, 1, bias=False)
    base.weight = nn.Parameter(inputs.weight, requires_grad=False)
    base.out_features, base.in_features = inputs.weight.shape
    layer = linear_class(base, names[0], config=config, r=r, lora_alpha=SCALING * r)
    for name in names[1:]:
        layer.update_layer(name, r, lora_alpha=SCALING * r, config=config)
    for e, name in enumerate(names):
        layer.lora_A[name].weight.data.copy_(inputs.a[e])
        layer.lora_B[name].weight.data.copy_(inputs.b[e])
        cast(layer, name, autocast)
    return layer


def _parameters(layer: Any, names: list[str]) -> tuple[Tensor, ...]:
    return tuple(side[name].weight for side in (layer.lora_A, layer.lora_B) for name in names)


def peft(inputs: Inputs, autocast: bool = True) -> Linear:
    if inputs.index is not None:
        raise Unavailable("one adapter a pass")
    layer = peft_layer(inputs, ["one"], autocast)
    return Linear(layer, _parameters(layer, ["one"]))


def peft_mixed(inputs: Inputs) -> Linear:
    """Every row names its adapter, which PEFT allows in inference only."""
    names = [f"a{e}" for e in range(len(inputs.a))]
    layer = peft_layer(inputs, names, autocast=True).eval()
    index = inputs.rows or (0,) * len(inputs.x)
    chosen = ["__base__" if e < 0 else names[e] for e in index]
    # it builds its lists of rows on the host and copies them over
    return Linear(lambda x: layer(x, adapter_names=chosen), trains=False, captures=False)


def peft_passes(inputs: Inputs, autocast: bool = True, switched: bool = False) -> Linear:
    """Actor's rows, critic's rows and rows without an adapter in three calls.

    Unless `switched`, two layers share the base, each with its adapter on for good, so that no switching is timed.
    """
    actor = peft_layer(inputs, ["actor", "critic"], autocast)
    critic = peft_layer(inputs, ["actor", "critic"], autocast)
    critic.set_adapter("critic")
    part = len(inputs.x) // 3

    def fixed(x: Tensor) -> tuple[Tensor, ...]:
        return actor(x[:part]), critic(x[part : 2 * part]), actor.base_layer(x[2 * part :])

    def switching(x: Tensor) -> tuple[Tensor, ...]:
        actor.set_adapter("actor")
        first = actor(x[:part])
        actor.set_adapter("critic")
        second = actor(x[part : 2 * part])
        actor.enable_adapters(False)
        third = actor(x[2 * part :])
        actor.enable_adapters(True)
        return first, second, third

    return Linear(switching if switched else fixed, trains=False)


PEERS: dict[str, Loader] = {
    OURS: ours,
    OURS_FP32: lambda inputs: ours(inputs, torch.float32),
    FROZEN: frozen,
    EAGER: eager,
    ADDMM: addmm,
    LOOP: loop_over_adapters,
    GATHERED: shrink_expand,
    PEFT: peft,
    PEFT_LOW: lambda inputs: peft(inputs, autocast=False),
    PEFT_MIXED: peft_mixed,
    PEFT_PASSES: peft_passes,
    PEFT_LOW_PASSES: lambda inputs: peft_passes(inputs, autocast=False),
    PEFT_SWITCHED: lambda inputs: peft_passes(inputs, switched=True),
}
ONE_ADAPTER = (OURS, OURS_FP32, FROZEN, EAGER, ADDMM, PEFT, PEFT_LOW)
DECODE = (OURS, FROZEN, EAGER, GATHERED, PEFT, PEFT_LOW)
DECODE_MIXED = (OURS, FROZEN, LOOP, GATHERED, PEFT_MIXED)
ROLES = (OURS, FROZEN, PEFT_PASSES, PEFT_LOW_PASSES, PEFT_SWITCHED, PEFT_MIXED)
MANY = (OURS, FROZEN, LOOP, GATHERED, PEFT_MIXED)
