"""INPO (arXiv 2407.00617): iterative Nash policy optimisation, self-play on the best and the worst of K samples.

    h    = dlog pi - (tau / eta) dlog pi_ref - ((eta - tau) / eta) dlog pi_t,    dlog p = log p(best) - log p(worst)
    loss = (h - 1 / (2 eta))^2

pi_t is the policy as it was when the round began: it samples, and it is refreshed at the first step of each of `rounds`
rounds. It is an adapter beside the policy's, on the base that without them is reference and reward model; with `lora_r`
0 it is a frozen copy, and so is the reference. A prompt whose samples all score the same teaches nothing.
"""

import torch
from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss, Source
from rlhf_trainer.config import TrainConfig
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
    samples = config.num_generations or 1
    scores = rollout.scores.view(-1, samples)
    best, worst = scores.argmax(1), scores.argmin(1)
    worst = torch.where(scores.amax(1) == scores.amin(1), best, worst)
    first = torch.arange(0, len(rollout), samples, device=scores.device)
    return torch.stack((first + best, first + worst), dim=1).flatten()


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """batch: pairs of neighbours, the better first. The mean over pairs."""
    out = model(
        batch.tokens,
        batch.lengths,
        roles=("actor",),
        prompt_lengths=batch.prompt_lengths,
        temperature=config.temperature,
    )
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
    if config.lora_r:
        roles = {
            "actor": Role("actor", "lm"),
            "snapshot": Role("snapshot", "lm"),
            "reference": Role(None, "lm"),
            "reward": Role(None, "reward"),
        }
        return Layout(roles, adapters=("actor", "snapshot"), snapshots=("snapshot",))
    roles = {
        "actor": Role(None, "lm"),
        "snapshot": Role(None, "lm", "snapshot"),
        "reference": Role(None, "lm", "reference"),
        "reward": Role(None, "reward", "reference"),
    }
    copies: dict[str, Source] = {"snapshot": "model", "reference": "model"}
    return Layout(roles, bases=copies, trained_bases=("base",), snapshots=("snapshot",))


ROWS = (
    Algorithm(
        name="inpo",
        layout=_layout,
        trained=("actor",),
        loss=loss,
        defaults={
            "learning_rate": 5e-6,
            "num_ppo_epochs": 1,
            "num_generations": 8,
            "kl_coef": 0.0,
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
            "lora_r": 128,
            "lora_alpha": 128.0,
            "vf_coef": 0.0,
        },
        scored=("actor", "reference", "snapshot"),
        select=select,
        group=2,
        begin=begin,
        least_generations=2,
        sampled="snapshot",
    ),
)
