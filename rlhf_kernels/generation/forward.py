"""The model as the engine sees it: packed tokens in, logits of the wanted rows out.

A HydraModel brings its own packed forward (`decode`). A plain transformers causal LM is switched to packed attention
and to eval mode while steps run, and is given back as it was.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_kernels.generation.lean import lean_modules
from rlhf_kernels.integrations.transformers import ATTENTION, SlicedRows, check_decoder, packed_attention
from rlhf_kernels.nn import sharding


class Forward(Protocol):
    """One causal LM, ready to run packed steps."""

    lm: Any  # the transformers model, for its config, dtype and device

    @property
    def fixed(self) -> bool:
        """Whether the weights lie at one place, as a captured step needs them."""

    def rollout(self) -> Any:
        """A context around all of a run's steps, open while others may use the model between two of them."""

    def prepared(self) -> Any:
        """A context in which `logits` may be called."""

    def logits(self, input_ids: Tensor, position_ids: Tensor, packed: SlicedRows, rows: Tensor) -> Tensor:
        """input_ids and position_ids int64 [tokens], rows int64 [R], indices of tokens. Returns [R, vocabulary]."""


@dataclass
class FirstStep:
    """A generator's first step: checks that no layer attends twice, where the arena holds one cache a layer."""

    rows: SlicedRows
    attended: set[int] = field(default_factory=set)

    def attend(self, layer: int, *qkv: Tensor, **options: Any) -> Tensor:
        self._count(layer)
        return self.rows.attend(layer, *qkv, **options)

    def rotate_and_attend(self, layer: int, *qkv: Any, **options: Any) -> Tensor:
        self._count(layer)
        return self.rows.rotate_and_attend(layer, *qkv, **options)

    def _count(self, layer: int) -> None:
        if layer in self.attended:  # the second time would overwrite what the first has written
            raise ValueError(f"model is not supported: its layer {layer} attends more than once a step")
        self.attended.add(layer)


class HydraForward:
    """A role of a HydraModel, through its adapter."""

    def __init__(self, model: Any, role: str) -> None:
        if role not in model.roles:
            raise ValueError(f"role is {role!r}; the model has {', '.join(sorted(model.roles))}")
        if model.roles[role].head != "lm":
            raise ValueError(
                f"role is {role!r}, whose head is {model.roles[role].head!r}; generation needs the head 'lm'"
            )
        self.model, self.role = model, role
        self.lm = model.base_model(role)
        self._checked = False

    @property
    def fixed(self) -> bool:
        return self.model.sharding is None

    def rollout(self) -> AbstractContextManager[None]:
        return sharding.rollout(self.model, self.role)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        with eval_mode(self.model), lean_modules(self.lm).applied(self.lm, self.logits):
            yield

    def logits(self, input_ids: Tensor, position_ids: Tensor, packed: SlicedRows, rows: Tensor) -> Tensor:
        first = not self._checked and type(packed) is SlicedRows  # a probe's layers attend in several ways
        checked: Any = FirstStep(packed) if first else packed
        with sharding.announced(self.model):
            out = self.model.decode(self.role, input_ids, position_ids, checked, rows)
        self._checked |= first
        return out


class PlainForward:
    """A transformers causal LM whose own attention implementation returns between steps."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        check_decoder(model)
        AttentionInterface.register(ATTENTION, packed_attention)
        self.lm = model
        self._configs = _configs(model)
        self._checked = False

    @property
    def fixed(self) -> bool:
        return True

    def rollout(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def prepared(self) -> Iterator[None]:
        # The config objects may be shared with other models: theirs, too, is back before anyone else runs.
        own = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = ATTENTION
        try:
            with eval_mode(self.lm), lean_modules(self.lm).applied(self.lm, self.logits):
                yield
        finally:
            for config, name in zip(self._configs, own):
                config._attn_implementation_internal = name

    def logits(self, input_ids: Tensor, position_ids: Tensor, packed: SlicedRows, rows: Tensor) -> Tensor:
        first = not self._checked and type(packed) is SlicedRows  # a probe's layers attend in several ways
        out = self.lm(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            logits_to_keep=rows,
            packed=FirstStep(packed) if first else packed,
        )
        self._checked |= first
        return out.logits[0]


def forward_of(model: Any, role: str) -> Forward:
    """The forward of a HydraModel's role, or of a plain causal LM (then `role` is not used)."""
    if hasattr(model, "decode") and hasattr(model, "roles"):
        return HydraForward(model, role)
    if not (hasattr(model, "set_attn_implementation") and hasattr(model, "get_output_embeddings")):
        raise TypeError(f"model is a {type(model).__name__}; it must be a HydraModel or a transformers causal LM")
    if not model.can_generate():
        raise TypeError(f"model is a {type(model).__name__}, which has no language-modelling head")
    return PlainForward(model)


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Modules in training mode (dropout) are in eval mode inside, and back in training mode after."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def vocabulary(lm: Any) -> int:
    """How many tokens the embedding knows."""
    return lm.get_input_embeddings().weight.shape[0]


def end_tokens(lm: Any) -> list[int]:
    """The model's end-of-sequence tokens, from its generation config or else its config; an int or a list there."""
    for config in (getattr(lm, "generation_config", None), lm.config):
        tokens = getattr(config, "eos_token_id", None)
        if tokens is not None:
            return [int(token) for token in (tokens if isinstance(tokens, (list, tuple)) else [tokens])]
    return []


def most_positions(lm: Any) -> int | None:
    """The longest sequence the model's positions reach, or None where its config sets no limit."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None)


def _configs(model: Any) -> list[Any]:
    """Every config object that may carry an attention implementation, once each."""
    found = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            for key in config.sub_configs:
                sub = getattr(config, key, None)
                if sub is not None:
                    found[id(sub)] = sub
    return list(found.values())
