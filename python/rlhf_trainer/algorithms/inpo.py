"""INPO (arXiv 2407.00617): iterative Nash policy optimisation, self-play on the best and the worst of K samples.

    h    = dlog pi - (tau / eta) dlog pi_ref - ((eta - tau) / eta) dlog pi_t,    dlog p = log p(best) - log p(worst)
    loss = (h - 1 / (2 eta))^2

pi_t is the policy as it was when the round began: it samples, and it is refreshed at the first step of each of `rounds`
rounds. It is an adapter beside the policy's, on the base that without them is reference and reward model; with `lora_r`
0 it is a frozen copy, and so is the reference. A prompt whose samples all score the same teaches nothing.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss, best, one_policy, run
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def begin(model: HydraModel, step: int, config: TrainConfig) -> None:
    """At a round's first step: pi_t becomes the policy."""
    if step and _round(step, config) == _round(step - 1, config):
        return
    if config.lora_r:
        model.copy_adapter("actor", "snapshot")
        return
    with torch.no_grad():
        for new, old in zip(model.base_model("actor").parameters(), model.base_model("snapshot").parameters()):
            old.copy_(new)


def _round(step: int, config: TrainConfig) -> int:
    """Which round step `step` belongs to, from 0: rounds of equal length, to a step."""
    return step * config.rounds // config.total_steps


def select(rollout: Rollout, config: TrainConfig) -> Tensor:
    """int64 [2 prompts]: of each prompt the best sample, then the worst; twice the same one where all score alike."""
    scores = rollout.scores
    top, bottom = best(scores, config), best(-scores, config)
    bottom = torch.where(scores[top] == scores[bottom], top, bottom)
    return torch.stack((top, bottom), dim=1).flatten()


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """batch: pairs of neighbours, the better first. The mean over pairs."""
    out = run(model, batch, ("actor",), config)
    sums = [batch.per_sequence(x) for x in (out["actor"].logprob, batch.ref_logprobs, batch.snapshot_logprobs)]
    policy, reference, snapshot = (x[0::2] - x[1::2] for x in sums)
    h = policy - config.tau_ratio * reference - (1 - config.tau_ratio) * snapshot
    value = ((h - 1 / (2 * config.eta)) ** 2).sum() / counts.sequences
    h, logprobs = h.detach(), sums[0].detach()
    metrics = {
        "loss/policy_avg": value.detach(),
        "rewards/margins": config.eta * h.sum() / counts.sequences,  # its goal is 1/2
        "rewards/accuracies": (h > 0).sum() / counts.sequences,
        "logps/chosen": logprobs[0::2].sum() / counts.sequences,
        "logps/rejected": logprobs[1::2].sum() / counts.sequences,
    }
    return Loss(value, metrics, batch.snapshot_logprobs)


def _layout(config: TrainConfig) -> Layout:
    """A policy with its reference and reward, and the snapshot beside it."""
    layout = one_policy(config)
    if config.lora_r:
        role, adapters, bases = Role("snapshot", "lm"), (*layout.adapters, "snapshot"), layout.bases
    else:
        role, adapters, bases = Role(None, "lm", "snapshot"), (), {"snapshot": "model", **layout.bases}
    roles = {**layout.roles, "snapshot": role}
    return replace(layout, roles=roles, adapters=adapters, bases=bases, snapshots=("snapshot",))


ROWS = (
    Algorithm(
        name="inpo",
        layout=_layout,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["inpo"],
        scored=("actor", "reference", "snapshot"),
        select=select,
        group=2,
        begin=begin,
        least_generations=2,
        sampled="snapshot",
        penalised=False,
    ),
)
