"""Models with PEFT's LoRA layers on the fused op: `accelerate(model)`, undone by `restore(model)`.

Adapters stay PEFT's own parameters and what PEFT does to them (adding, activating, scaling, saving) works as before;
only the forward of each layer is another. Layers the op does not serve keep PEFT's forward: see `accelerated`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from torch import Tensor, nn

from rlhf_kernels.integrations.peft_routes import Route, Routes, forget_routes
from rlhf_kernels.nn.siblings import group_siblings
from rlhf_kernels.ops.lora import Routing, build_routing

Model = TypeVar("Model", bound=nn.Module)
log = logging.getLogger(__name__)


def accelerate(model: Model, *, fuse: bool = True) -> Model:
    """Gives every supported LoRA layer of `model` the fused op's forward, in place; returns `model`.

    Args:
        model: any module that holds PEFT LoRA layers: a PeftModel, or what wraps one. Calling it again is harmless,
            and takes in the layers that were added in between.
        fuse: compute projections of one tensor (q, k and v; gate and up) together.

    Raises:
        ValueError: no LoRA layer of the model is supported; says why. ImportError: PEFT is not installed.
    """
    layers = _layers()
    found = {path: module for path, module in model.named_modules() if isinstance(module, layers.LoraLayer)}
    new = {path: module for path, module in found.items() if not isinstance(module, layers.Linear)}
    left = {path: why for path, module in new.items() if (why := layers.reason(module)) is not None}
    if len(left) == len(found):
        why = next((f"{path}: {why}" for path, why in left.items()), "it has none; wrap it with get_peft_model first")
        raise ValueError(f"model: no LoRA layer of this {type(model).__name__} can be accelerated ({why})")
    routes = _routes(model, layers) or Routes()
    for path, module in found.items():
        if path not in left and type(module) is layers.PeftLinear:
            _exchange(module, layers.Linear, routes)
            module.siblings = [module]
    for module in model.modules():
        if type(module) is layers.PeftLoraModel:
            _exchange(module, layers.LoraModel, routes)
    group_siblings(model, fuse, layers.Linear)
    if left:
        path, why = next(iter(left.items()))
        log.warning("%d of %d LoRA layers keep PEFT's forward; the first, %s: %s", len(left), len(found), path, why)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every layer has PEFT's forward again. Harmless on a model that was not accelerated.

    ValueError for layers whose class was exchanged once more since, as FSDP does: undo that first.
    """
    layers = _layers()
    for path, module in model.named_modules():
        if isinstance(module, layers.Linear) and type(module) is not layers.Linear:
            raise ValueError(f"model: {path} is a {type(module).__name__} by now; it cannot be restored")
    for module in model.modules():
        forget_routes(module)
        if type(module) is layers.Linear:
            _exchange(module, layers.PeftLinear, None)
        elif type(module) is layers.LoraModel:
            _exchange(module, layers.PeftLoraModel, None)
    return model


def accelerated(model: nn.Module) -> dict[str, str | None]:
    """The LoRA layers of a model by path: None for one with the fused op's forward, else why it has PEFT's own."""
    layers = _layers()
    return {
        path: None if isinstance(module, layers.Linear) else layers.reason(module) or "accelerate was not called"
        for path, module in model.named_modules()
        if isinstance(module, layers.LoraLayer)
    }


@contextmanager
def route(model: nn.Module, routing: Routing | Tensor, adapters: Sequence[str]) -> Iterator[None]:
    """Rows of one batch use different adapters in the forwards inside this context, in training too.

    Args:
        model: accelerated.
        routing: which adapter each row uses: a Routing over len(adapters) slots, or an int tensor of slots, -1 for the
            bypass, one for each sample or each row of the layers' inputs [..., K] (which are a multiple of it).
        adapters: the names of the slots; they need not be active.

    A layer that transformers checkpoints is recomputed under the route of its own forward.

    Raises:
        ValueError: a name that no layer has; a layer that cannot be routed (it keeps PEFT's forward).
    """
    layers = _layers()
    routes = _routes(model, layers)
    if routes is None:
        raise ValueError("model: it is not accelerated; call rlhf_kernels.integrations.peft.accelerate(model) first")
    for path, why in layers.unrouted(model).items():
        raise ValueError(f"model: {path} cannot be routed: {why}")
    if isinstance(adapters, str):
        raise TypeError(f"adapters is {adapters!r}; it must be a sequence of names")
    if isinstance(routing, Tensor):
        routing = build_routing(routing, len(adapters))
    if routing.adapters != len(adapters):
        raise ValueError(f"routing was built for {routing.adapters} adapters; adapters has {len(adapters)} names")
    with layers.routed(model, routes, Route(tuple(adapters), routing).used()):
        yield


def _layers() -> ModuleType:
    try:
        from rlhf_kernels.integrations import peft_layers
    except ImportError as error:
        raise ImportError("rlhf_kernels.integrations.peft needs PEFT: pip install 'rlhf-kernels[peft]'") from error
    return peft_layers


def _routes(model: nn.Module, layers: ModuleType) -> Routes | None:
    return next((module._routes for module in model.modules() if isinstance(module, layers.Linear)), None)


def _exchange(module: nn.Module, kind: type[nn.Module], routes: Routes | None) -> None:
    """Python lets an object change its class: its attributes stay, its methods are the other's."""
    module.__class__ = kind
    if routes is None:
        del module.__dict__["_routes"]
        module.__dict__.pop("siblings", None)
    else:
        module.__dict__["_routes"] = routes
