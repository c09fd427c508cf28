"""What an algorithm is to the core: a row that names its models, how it samples, its advantages and its loss.

Losses are sums over a micro-batch divided by counts of the whole minibatch (all micro-batches, all processes), so the
gradients of the micro-batches add up to the gradient of the minibatch's mean, whatever the split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.rollout import Rollout

Source = Literal["model", "reward_model"]  # which of the configuration's two checkpoints a base is loaded from

# Fields of TrainConfig that mean nothing to rows that learn from a file, and the optimiser settings those rows share.
OFFLINE_DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "lora_r": 0,
    "lora_alpha": 32.0,
    "num_ppo_epochs": 1,
    "kl_coef": 0.0,
    "vf_coef": 0.0,
}


@dataclass(frozen=True)
class Layout:
    """Base copies, adapters and the roles that combine them. The base named "base" is always `config.model`."""

    roles: Mapping[str, Role]
    adapters: tuple[str, ...] = ()
    bases: Mapping[str, Source] = field(default_factory=dict)  # copies besides "base"
    trained_bases: tuple[str, ...] = ()
    head_start: str | None = None  # the role whose reward head the critic's head starts as a copy of
    head_source: Source = "model"  # the checkpoint that role's head is loaded from


class Counts(NamedTuple):
    """Sizes of one whole minibatch: the denominators of its means."""

    tokens: float
    sequences: float  # pairs, for preference losses


class Loss(NamedTuple):
    """One micro-batch's share of the minibatch's loss (a scalar) and of its metrics (detached; they add up)."""

    value: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor | None = None  # fp32 [completion tokens], detached: compared with what the rollout captured


@dataclass(frozen=True)
class Algorithm:
    """A row of the table of algorithms.

    `defaults` fills the fields of TrainConfig that are None. Rows with `data` learn from a file; the others sample:
    `scored` are the roles that read each rollout, `advantages` fills `rollout.advantages` (and `.returns`) in fp32.
    """

    name: str
    summary: str
    layout: Callable[[TrainConfig], Layout]
    trained: tuple[str, ...]
    loss: Callable[[HydraModel, Any, Counts, TrainConfig], Loss]
    defaults: Mapping[str, Any]
    data: Literal["demonstrations", "preferences"] | None = None
    scored: tuple[str, ...] = ()
    advantages: Callable[[Rollout, TrainConfig], None] | None = None
    greedy_baseline: bool = False
    prepare: Callable[[HydraModel, list[Any], TrainConfig], list[Any]] | None = None  # a file's rows, once, at the start
