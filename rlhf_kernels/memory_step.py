"""The bytes that a step's forwards and backwards hold, by running them on the meta device with at most four layers.

Nothing is fitted: it is the model's own code and our own ops, saved tensors included, that say what they keep. A
decoder's layers are alike, so the stretch of the third stands for all that are left out; where their shapes differ the
whole decoder runs.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlhf_kernels.memory_layouts import Call, Layout
from rlhf_kernels.memory_meter import Meter, Timeline
from rlhf_kernels.memory_scratch import kept, scratch

LAYERS = 4  # that are traced; the one before the last is repeated
REPEATED = LAYERS - 2


@dataclass(frozen=True)
class Peak:
    """`peak`: the most live bytes; `kept`: those at the end of the forwards; `libraries`: what those hold on to."""

    peak: int
    kept: int
    libraries: int


class Steps:
    """An algorithm's models on the meta device, cut to few layers.

    make: builds the causal LM of a config on the meta device;  config: of transformers;  targets: of the adapters
    """

    def __init__(
        self,
        make: Callable[[Any], nn.Module],
        config: Any,
        layout: Layout,
        rank: int,
        targets: str | list[str],
        checkpointing: bool,
    ) -> None:
        from rlhf_kernels.nn import HydraModel, LoraSpec, Role

        whole, self.repeats = config, 0
        config, repeats = shortened(config)
        names = layout.base_names()
        try:
            bases = {name: make(config) for name in names}
        except (ValueError, IndexError, KeyError, TypeError):  # a list of layers that is not as long
            config, repeats = whole, 0
            bases = {name: make(config) for name in names}
        if repeats and not _alike(next(iter(bases.values()))):
            repeats = 0
            bases = {name: make(whole) for name in names}
        self.repeats, self.layout = repeats, layout
        self.model = HydraModel(
            cast(Any, bases),
            {name: LoraSpec(r=rank) for name in layout.adapters},
            {name: Role(*part) for name, part in layout.roles.items()},
            [name for name, base in names.items() if base.trained],
            targets,
        )
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        trained = {id(p) for role in layout.trained for p in self.model.trainable_parameters(role)}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.update = lru_cache(maxsize=None)(self._update)
        self.score = lru_cache(maxsize=None)(self._score)

    def _update(self, batch: int, prompt: int, response: int, accumulate: bool) -> Peak:
        """Forward and backward of one micro-batch. accumulate: gradients are there already, and not counted."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.empty_like(p) if accumulate else None
        meter = self._meter([p.grad for p in parameters if p.grad is not None])
        with meter, _Marks(self.model, meter):
            sums = [self._forward(call, batch, prompt, response) for call in self.layout.update]
            loss = torch.stack([s for some in sums for s in some]).sum()
            del sums
            meter.mark("backward")
            loss.backward()
        timeline = self._timeline(meter)
        ends = next(i for i, (stretch, _) in enumerate(timeline.stretches) if stretch.label == "backward")
        for p in parameters:
            p.grad = None
        return Peak(timeline.peak, Timeline(timeline.stretches[:ends]).net, kept(meter.products, self.layout.rollout))

    def _score(
        self, batch: int, prompt: int, response: int, roles: tuple[str, ...], divergence: tuple[str, ...] = ()
    ) -> int:
        """A forward without gradients; every completion token reads the vocabulary."""
        meter = self._meter([])
        with meter, _Marks(self.model, meter):
            tokens, lengths, prompts = _batch(batch, prompt, response)
            out = self.model.score(
                tokens, lengths, roles=roles, prompt_lengths=prompts, entropy="actor" in roles, divergence=divergence
            )
        del out
        return self._timeline(meter).peak

    def _forward(self, call: Call, batch: int, prompt: int, response: int) -> list[Tensor]:
        tokens, lengths, prompts = _batch(batch * call.sequences, prompt, response)
        fields = ("logprob", *call.divergence)
        out = self.model(
            tokens, lengths, roles=call.roles, prompt_lengths=prompts, divergence=call.divergence, grad_fields=fields
        )
        values = [getattr(out[role], field) for role in call.roles for field in (*fields, "value", "reward")]
        return [value.sum() for value in values if value is not None and value.requires_grad]

    def _meter(self, known: Sequence[Tensor]) -> Meter:
        return Meter([*self.model.parameters(), *self.model.buffers(), *known], scratch)

    def _timeline(self, meter: Meter) -> Timeline:
        meter.finish()
        return Timeline(tuple((s, self.repeats + 1 if s.label == "repeated" else 1) for s in meter.stretches))


class _Marks:
    """Marks where each decoder layer's forward begins and its backward ends."""

    def __init__(self, model: Any, meter: Meter) -> None:
        self.meter, self.backward, self.handles = meter, False, []
        for _, base in model.decoders():
            for number, layer in enumerate(decoder_layers(base)):
                self.handles.append(layer.register_forward_pre_hook(partial(self._enters, number), with_kwargs=True))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _enters(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:  # a checkpointed layer is computed again
            return
        self.meter.mark("repeated" if number == REPEATED else "")
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(self._leaves, number))

    def _leaves(self, number: int, grad: Tensor) -> None:
        self.meter.mark("repeated" if number == REPEATED + 1 else "")


def _batch(sequences: int, prompt: int, response: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.zeros(sequences * (prompt + response), dtype=torch.int64, device="meta")
    return tokens, torch.tensor([prompt + response] * sequences), torch.tensor([prompt] * sequences)


def shortened(config: Any) -> tuple[Any, int]:
    """The config with at most LAYERS layers, and how many it leaves out."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    if layers <= LAYERS or getattr(text, "is_heterogeneous", False):
        return config, 0
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = LAYERS
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:LAYERS]
    return config, layers - LAYERS


def decoder_layers(base: Any) -> nn.ModuleList:
    """The list of a decoder's layers."""
    count = base.config.get_text_config().num_hidden_layers
    return next(m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def _alike(base: Any) -> bool:
    """Whether all layers hold parameters of the same shapes."""
    shapes = [[(n, p.shape) for n, p in layer.named_parameters()] for layer in decoder_layers(base)]
    return all(some == shapes[0] for some in shapes)
