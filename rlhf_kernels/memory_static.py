"""Weights, gradients and optimiser state of every part of a layout: counted on the meta device, exact to the byte."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rlhf_kernels.memory_layouts import Layout

MOMENTS = {"adamw": 2, "sgd": 0}  # fp32 numbers an optimiser keeps for each trained parameter


@dataclass(frozen=True)
class PlanRow:
    """Bytes of one part. `phase`: "static" is there all the time, the others take turns (see `Plan.peaks`)."""

    name: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    other: int = 0
    phase: str = "static"
    exact: bool = True
    narrow: int = 0  # of those, the ones of less than fp32, which have a master

    @property
    def bytes(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.other


def static_rows(
    model: Any, layout: Layout, rank: int, target_modules: str | list[str], moments: int
) -> Iterable[PlanRow]:
    """A row a base, an adapter, and one for the scalar heads; `model` is a base on the meta device."""
    parameters = list(model.parameters())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    unread = [] if head is None or head.weight is embeddings.weight else [head.weight, *_bias(head)]
    for name, base in layout.base_names().items():
        title = base.role + ("" if base.role == "shared base" else " model")
        if base.trained:
            yield _trained(title, parameters, moments, [] if layout.reads_vocabulary(name) else unread)
        else:
            yield PlanRow(title, weights=_nbytes(parameters))
    if layout.adapters:
        shapes = adapter_parameters(model, rank, target_modules)
        for adapter, trained in layout.adapters.items():
            title = adapter + " adapter"
            yield _trained(title, shapes, moments, []) if trained else PlanRow(title, weights=_nbytes(shapes))
    if layout.heads:
        yield _heads(layout, embeddings.weight.shape[1], moments)


def adapter_parameters(model: Any, rank: int, target_modules: str | list[str] = "all-linear") -> list[Any]:
    """The A [r, K] and B [N, r] of one fp32 adapter, on the meta device, for every Linear it would replace."""
    import torch

    from rlhf_kernels.nn.lora import targeted

    tensors = []
    for path in targeted(model, target_modules):
        module = model.get_submodule(path)
        rows, cols = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        for shape in ((rank, cols), (rows, rank)):
            tensors.append(torch.empty(shape, dtype=torch.float32, device="meta"))
    return tensors


def optimizer_temporaries(rows: Iterable[PlanRow]) -> int:
    """While the optimiser steps, masters have fp32 gradients in the place of the narrow ones, which count above."""
    return 2 * sum(row.narrow for row in rows)


def _bias(head: Any) -> list[Any]:
    return [] if head.bias is None else [head.bias]


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _trained(name: str, tensors: list[Any], moments: int, idle: list[Any]) -> PlanRow:
    """Weights and gradients in their dtype; fp32 masters of lower precisions; moments; AdamW's step (4 bytes)."""
    active = [t for t in tensors if not any(t is other for other in idle)]
    masters = sum(4 * t.numel() for t in tensors if t.element_size() < 4)
    state = sum(4 * moments * t.numel() + (4 if moments else 0) for t in active)
    narrow = sum(t.numel() for t in active if t.element_size() < 4)
    return PlanRow(name, _nbytes(tensors), _nbytes(active), masters + state, narrow=narrow)


def _heads(layout: Layout, hidden: int, moments: int) -> PlanRow:
    """Scalar heads [1, hidden] in fp32."""
    trained, one = sum(layout.heads.values()), 4 * hidden
    state = trained * (moments * one + (4 if moments else 0))
    return PlanRow("scalar heads", len(layout.heads) * one, trained * one, state)
