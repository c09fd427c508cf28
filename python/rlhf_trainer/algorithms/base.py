"""What an algorithm is to the core: a row that names its models, how it samples, its advantages and its loss.

Rows stand in the tuples ROWS of this package's modules, which `rlhf_trainer.algorithms.TABLE` finds by itself; their
names in `rlhf_trainer.names`, their defaults in `rlhf_trainer.defaults`, their settings for the demo in
`rlhf_trainer.demo.settings`. One step of a row that samples:

    begin(model, step, config)                 snapshots; must do the same when the step is done again after a resume
    rollout: num_generations samples a prompt (and a greedy one), next to each other in the order of the prompts
    scoring by the roles `scored`, as far as the layout has them; raw scores
    normalize(scores, state, config) -> scores, then reward_clip and missing_eos_penalty
    rollout.penalties, rollout.rewards         -kl_coef d_t; and the score at the last token
    advantages(rollout, config, state)
    select(rollout, config) -> index           what is trained on; metrics are of the whole rollout
    loss(model, batch, counts, config)         for every micro-batch of every minibatch

Two things need no hook and work for every row that samples: `config.demonstrations` adds ptx_coef times their
cross-entropy to each minibatch (PPO-ptx), and during the first `config.critic_warmup_steps` steps only the critic is
updated, the policy stays.

Losses are sums over a micro-batch divided by counts of the whole minibatch (all micro-batches, all processes), so the
gradients of the micro-batches add up to the gradient of the minibatch's mean, whatever the split.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.rollout import Packed, Rollout

Source = Literal["model", "reward_model"]  # which of the configuration's two checkpoints something is loaded from
State = dict[str, float]  # a row's own running numbers, empty at the start of a run and kept in its checkpoints


@dataclass(frozen=True)
class Layout:
    """Base copies, adapters and the roles that combine them. The base named "base" is always `config.model`."""

    roles: Mapping[str, Role]
    adapters: tuple[str, ...] = ()
    bases: Mapping[str, Source] = field(default_factory=dict)  # copies besides "base"
    trained_bases: tuple[str, ...] = ()
    head_start: str | None = None  # the role whose reward head the critic's head starts as a copy of
    head_source: Source = "model"  # the checkpoint that role's head is loaded from
    # Adapters that a finished run left, frozen, by the checkpoint (its output_dir) they and their heads are read from;
    # rank, scaling and layers are theirs. They stand in `adapters` too.
    loaded: Mapping[str, Source] = field(default_factory=dict)
    # Frozen adapters or bases whose values `begin` changes: checkpoints keep them. They stand in `adapters` or `bases`;
    # a snapshot adapter starts at zero, as every adapter does.
    snapshots: tuple[str, ...] = ()


class Counts(NamedTuple):
    """Sizes of one whole minibatch: the denominators of its means."""

    tokens: float
    sequences: float  # groups, for a row with `group`; pairs, for rows that learn from preferences


class Loss(NamedTuple):
    """One micro-batch's share of the minibatch's loss (a scalar) and of its metrics (detached; they add up)."""

    value: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor | None = None  # fp32 [completion tokens], detached: compared with what the rollout captured


@dataclass(frozen=True)
class Algorithm:
    """A row of the table of algorithms.

    `defaults` fills the fields of TrainConfig that are None (`num_generations` 1 unless it says else). Rows with `data`
    learn from a file: of them the core uses layout, trained, loss, defaults and prepare. The others sample.

    Attributes:
        prepare: the file's rows, once, before the first step and before a resumed run's weights are loaded.
        sampled: the role that samples rollouts; evaluations sample with the actor.
        scored: roles that read each rollout, of actor, reference, critic and snapshot (into `rollout.logprobs`,
            `.ref_logprobs`, `.values`, `.snapshot_logprobs`); those that the layout lacks are left out. "reward" is
            read by itself when no reward is given.
        advantages: fills `rollout.advantages` (and `.returns`) in fp32 from rewards, values, scores and `state`.
        normalize: raw scores [N] (of the samples, then of the greedy completions, if any) -> scores, before clipping.
        select: int64 [M], the completions to train on; best of n, for example (`best`).
        group: so many neighbouring completions (of those selected) stay together, in order, when minibatches and
            micro-batches are cut: 2 for pairs. A loss sees whole groups.
        begin: before the rollout of step `step` (from 0).
        least_generations: the fewest samples a prompt with which the row means anything.
        penalised: whether `rollout.rewards`, and with them the penalties of `kl_estimator`, are of any effect.
    """

    name: str
    layout: Callable[[TrainConfig], Layout]
    trained: tuple[str, ...]
    loss: Callable[[HydraModel, Any, Counts, TrainConfig], Loss]
    defaults: Mapping[str, Any]
    data: Literal["demonstrations", "preferences"] | None = None
    prepare: Callable[[HydraModel, list[Any], TrainConfig], list[Any]] | None = None
    sampled: str = "actor"
    scored: tuple[str, ...] = ()
    greedy_baseline: bool = False
    least_generations: int = 1
    penalised: bool = True
    advantages: Callable[[Rollout, TrainConfig, State], None] | None = None
    normalize: Callable[[Tensor, State, TrainConfig], Tensor] | None = None
    select: Callable[[Rollout, TrainConfig], Tensor] | None = None
    group: int = 1
    begin: Callable[[HydraModel, int, TrainConfig], None] | None = None


def one_policy(config: TrainConfig) -> Layout:
    """A policy, its reference and the reward model; no critic.

    With `lora_r` > 0 an adapter on one base, which without it is the other two; else a whole trained base beside one
    frozen copy, which serves both heads. A `reward_model` of its own is one copy more.
    """
    frozen = "base" if config.lora_r else "reference"
    bases: dict[str, Source] = {} if config.lora_r else {"reference": "model"}
    roles = {
        "actor": Role("actor" if config.lora_r else None, "lm"),
        "reference": Role(None, "lm", frozen),
        "reward": Role(None, "reward", "reward" if config.reward_model else frozen),
    }
    if config.reward_model:
        bases["reward"] = "reward_model"
    return Layout(roles, ("actor",) if config.lora_r else (), bases, () if config.lora_r else ("base",))


def run(
    model: HydraModel, batch: Packed, roles: tuple[str, ...], config: TrainConfig, **wanted: Any
) -> Mapping[str, Any]:
    """role -> RoleOutput of a micro-batch's completions, with gradients, at the temperature they were sampled at."""
    return model(
        batch.tokens,
        batch.lengths,
        roles=roles,
        prompt_lengths=batch.prompt_lengths,
        temperature=config.temperature,
        **wanted,
    )


def best(values: Tensor, config: TrainConfig) -> Tensor:
    """The index of the largest of `values` [N] among each prompt's num_generations neighbours: int64 [prompts]."""
    samples = config.num_generations or 1
    first = torch.arange(0, len(values), samples, device=values.device)
    return first + values.view(-1, samples).argmax(1)
