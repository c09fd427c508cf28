"""From scores to per-token rewards: clipping, the missing-EOS penalty, and -kl_coef d_t at every token.

With a = log pi - log pi_ref at the sampled token (arXiv 2309.09055, table of regularisers):

    kl a   clamped_kl max(a, 0)   squared_error a^2/2   bregman e^-a - 1 + a
    jensen_shannon 1/2 [max(log pi - log m, 0) + max(log pi_ref - log m, 0)],  m = (pi + pi_ref)/2
    full_kl, full_js: exact over the vocabulary   none 0
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf_trainer.config import TrainConfig

if TYPE_CHECKING:
    from rlhf_trainer.rollout import Rollout

EXACT = {"full_kl": "kl", "full_js": "js"}  # estimator -> the divergence that scoring is asked for


def penalty(estimator: str, logprobs: Tensor, ref_logprobs: Tensor, exact: Tensor | None = None) -> Tensor:
    """d_t, fp32, one a token. `exact` is the whole-vocabulary divergence for the `full_` estimators."""
    a = logprobs - ref_logprobs
    if estimator == "kl":
        return a
    if estimator == "clamped_kl":
        return a.clamp(min=0)
    if estimator == "squared_error":
        return a**2 / 2
    if estimator == "bregman":
        return torch.expm1(-a) + a
    if estimator == "jensen_shannon":
        # log pi - log m = -log((1 + e^-a) / 2), written so that equal policies give exactly 0
        over, under = -torch.log1p(torch.expm1(-a) / 2), -torch.log1p(torch.expm1(a) / 2)
        return 0.5 * (over.clamp(min=0) + under.clamp(min=0))
    if estimator in EXACT:
        if exact is None:
            raise ValueError(f"exact: {estimator} needs the divergence over the vocabulary, got None")
        return exact
    if estimator == "none":
        return torch.zeros_like(a)
    raise ValueError(f"kl_estimator: {estimator!r} is unknown")


def shape_scores(scores: Tensor, finished: Tensor, config: TrainConfig) -> Tensor:
    """Clips raw scores to +-reward_clip, then takes missing_eos_penalty from completions that were cut off. [N]."""
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    if config.missing_eos_penalty is not None:
        scores = scores - config.missing_eos_penalty * (~finished).float()
    return scores


def shape_rewards(rollout: "Rollout", kl_coef: float, config: TrainConfig) -> None:
    """Fills `penalties` and `rewards` from logprobs and scores; the score is added at each last real token.

    Without a reference there is nothing to be penalised for.
    """
    if rollout.ref_logprobs.numel():
        d = penalty(config.kl_estimator, rollout.logprobs, rollout.ref_logprobs, rollout.divergences)
        rollout.penalties = -kl_coef * d
    else:
        rollout.penalties = torch.zeros_like(rollout.logprobs)
    rollout.rewards = rollout.penalties.clone()
    rollout.rewards[rollout.completion_lengths.cumsum(0) - 1] += rollout.scores


class KLController:
    """The coefficient of the KL penalty: fixed, or adaptive towards `kl_target` (Ziegler et al., arXiv 1909.08593)."""

    def __init__(self, config: TrainConfig) -> None:
        self.value = float(config.kl_coef or 0.0)
        self.adaptive = config.kl_controller == "adaptive"
        self.target, self.horizon = config.kl_target, config.kl_horizon

    def update(self, kl: float, sequences: int) -> None:
        """kl: this rollout's mean sum of log pi - log pi_ref a sequence."""
        if self.adaptive:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * sequences / self.horizon
