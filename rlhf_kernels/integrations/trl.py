"""TRL's trainers on the fused head and the fused LoRA: `patch(trainer)`, undone by `unpatch(trainer)`.

Since 1.16 every TRL trainer with a language-model head reads log-probabilities and entropies from one place, the fused
head that it adds to its models. `patch` exchanges the kernel of that head, in each model on its own; what the trainer
makes of the numbers (any loss, metric or option) stays TRL's code. What needs whole logits is TRL's own path as before.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn

from rlhf_kernels.integrations import peft
from rlhf_kernels.integrations.trl_kernel import LAYER, Kernel, Layer, lay, lift, theirs

VERSIONS = ("1.16.0",)
LORA = "_rlhf_kernels_lora"  # in the __dict__ of a model whose LoRA layers were accelerated here
Target = TypeVar("Target")
log = logging.getLogger(__name__)


def patch(target: Target, *, lora: bool = True, entropy_grad: bool | None = None) -> Target:
    """Gives the heads of a TRL trainer's models our kernel, and PEFT's LoRA layers theirs, in place; returns `target`.

    Args:
        target: a trainer of TRL 1.16.0 (SFT, DPO, GRPO, RLOO, KTO and what subclasses them), before or after training
            began; or a model that has TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), wrapped or not.
            Calling it again is harmless.
        lora: also `rlhf_kernels.integrations.peft.accelerate` the models that hold LoRA layers.
        entropy_grad: whether gradients flow through the entropies. None: as the loss needs it for TRL's own trainers
            (only GRPO's entropy bonus does); True for subclasses of one's own and for models. Without it a frozen head
            costs one product less.

    Raises:
        ValueError: another version of TRL; no model of the target has a head of TRL's that can be served; says why.
        TypeError: target is neither a trainer nor a module. ImportError: TRL is not installed.
    """
    _check_version()
    if entropy_grad is None:
        entropy_grad = _differentiates_entropy(target)
    served: list[nn.Module] = []
    left: dict[str, str] = {}
    for path, model in _heads(target).items():
        why = _reason(target, model)
        if why is None:
            served.append(model)
        else:
            left[path] = why
    if not served:
        path, why = next(iter(left.items()), ("target", "no model of it has TRL's fused head"))
        raise ValueError(f"{path}: {why}; nothing can be patched")
    for model in served:
        _patch_head(target, model, Kernel(entropy_grad))
    for model in _roots(target).values() if lora else ():
        _accelerate(model)
    for path, why in left.items():
        log.warning("%s keeps TRL's head: %s", path, why)
    return target


def unpatch(target: Target) -> Target:
    """Undoes `patch`: TRL's own kernel and PEFT's own layers again. Harmless on what was not patched."""
    for model in _heads(target).values():
        if LAYER in model.__dict__:
            lift(model)
    for model in _roots(target).values():
        if model.__dict__.pop(LORA, False):
            peft.restore(model)
    return target


@contextmanager
def patching(target: Target, *, lora: bool = True, entropy_grad: bool | None = None) -> Iterator[Target]:
    """`patch` for the length of a with statement."""
    patch(target, lora=lora, entropy_grad=entropy_grad)
    try:
        yield target
    finally:
        unpatch(target)


def patched(target: object) -> dict[str, str | None]:
    """The heads of a trainer's models (or a model's) by path: None for one on our kernel, else why it has TRL's own."""

    def state(model: nn.Module) -> str | None:
        layer: Layer | None = model.__dict__.get(LAYER)
        return None if layer is not None and layer.on else _reason(target, model) or "patch was not called"

    return {path: state(model) for path, model in _heads(target).items()}


def _check_version() -> None:
    try:
        import trl
    except ImportError as error:
        raise ImportError("rlhf_kernels.integrations.trl needs TRL: pip install 'rlhf-kernels[trl]'") from error
    if trl.__version__ not in VERSIONS:
        raise ValueError(
            f"TRL {trl.__version__} is installed; this integration is written for {', '.join(VERSIONS)} and changes "
            f"nothing in another: pip install 'trl=={VERSIONS[-1]}'"
        )


def _roots(target: object) -> dict[str, nn.Module]:
    """The modules of a trainer by attribute, each once; a module is its own."""
    from transformers import Trainer

    if isinstance(target, nn.Module):
        return {"model": target}
    if not isinstance(target, Trainer):
        raise TypeError(f"target is a {type(target).__name__}; it must be a trainer or a module")
    found: dict[int, tuple[str, nn.Module]] = {}
    for name in sorted(vars(target), key=lambda name: name != "model"):
        value = vars(target)[name]
        if isinstance(value, nn.Module):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def _heads(target: object) -> dict[str, nn.Module]:
    """The models that TRL gave a fused head, by path."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, root in _roots(target).items():
        for path, module in root.named_modules():
            if LAYER in module.__dict__ or theirs(module) is not None:
                found.setdefault(id(module), (f"{name}.{path}".rstrip("."), module))
    return dict(found.values())


def _reason(target: object, model: nn.Module) -> str | None:
    """Why a head keeps TRL's kernel."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 holds the head's weight only inside its own calls"
    if LAYER not in model.__dict__ and model.__dict__.get("forward") != theirs(model) and isinstance(target, nn.Module):
        return "its forward was wrapped for mixed precision; pass the trainer, which knows the dtype"
    return None


def _patch_head(target: Any, model: nn.Module, kernel: Kernel) -> None:
    if LAYER in model.__dict__:
        layer: Layer = model.__dict__[LAYER]
        layer.on = True
        return
    forward = theirs(model)
    assert forward is not None
    wrapped = model.__dict__["forward"] != forward
    autocast: Callable[[], AbstractContextManager] = target.accelerator.autocast if wrapped else nullcontext
    lay(model, forward, kernel, autocast)


def _accelerate(model: nn.Module) -> None:
    """PEFT's layers of `model`, if it has any, on the fused op; what is so already is not undone with the patch."""
    try:
        layers = peft.accelerated(model)
    except ImportError:
        return
    if not layers or None in layers.values():
        return
    try:
        peft.accelerate(model)
        model.__dict__[LORA] = True
    except ValueError as error:
        log.warning("LoRA layers keep PEFT's forward: %s", error)


def _differentiates_entropy(target: object) -> bool:
    """TRL's own losses take gradients through entropies for GRPO's bonus alone; another's may always."""
    own = type(target).__module__.startswith("trl.trainer.")
    return not own or bool(getattr(target, "_entropy_bonus_enabled", False))
