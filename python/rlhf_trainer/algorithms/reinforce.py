"""REINFORCE and RLOO (arXiv 2402.14740): the whole completion is one action, its return the score less its KL.

    R_i  = r_i - kl_coef sum_t d_t
    A_i  = R_i - b                       REINFORCE: b is the mean of all returns so far, this step's among them
    A_i  = R_i - mean_{j != i} R_j       RLOO: over the other samples of the same prompt
    loss = -mean_i A_i sum_t log pi(y_t)

No critic, no ratio, no clipping; A is detached. `baseline_decay` < 1 lets REINFORCE's baseline forget: a step's weight
falls by that factor with each step after it. `loss="token-mean"` divides by tokens instead of completions.
"""

from torch import Tensor

from rlhf_kernels.nn import HydraModel
from rlhf_trainer.algorithms.base import Algorithm, Counts, Loss, State, one_policy, run
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def reinforce(rollout: Rollout, config: TrainConfig, state: State) -> None:
    """Returns above their moving average. state: sum and weight of the returns of all steps so far."""
    returns = rollout.per_sequence(rollout.rewards)
    state["sum"] = config.baseline_decay * state.get("sum", 0.0) + float(returns.mean())
    state["weight"] = config.baseline_decay * state.get("weight", 0.0) + 1.0
    _spread(rollout, returns - state["sum"] / state["weight"])


def rloo(rollout: Rollout, config: TrainConfig, state: State) -> None:
    """Returns above the mean return of the same prompt's other samples."""
    samples = config.num_generations or 1
    returns = rollout.per_sequence(rollout.rewards).view(-1, samples)
    others = (returns.sum(1, keepdim=True) - returns) / (samples - 1)
    _spread(rollout, (returns - others).flatten())


def _spread(rollout: Rollout, advantages: Tensor) -> None:
    """Every token of a completion has the completion's advantage."""
    rollout.advantages = advantages.repeat_interleave(rollout.completion_lengths)


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """Advantage-weighted log-likelihood of the sampled tokens."""
    out = run(model, batch, ("actor",), config)
    logprobs = out["actor"].logprob
    count = counts.sequences if config.loss == "sequence" else counts.tokens
    value = -(batch.advantages * logprobs).sum() / count
    return Loss(value, {"loss/policy_avg": value.detach()}, logprobs.detach())


ROWS = (
    Algorithm(
        name="reinforce",
        layout=one_policy,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["reinforce"],
        scored=("actor", "reference"),
        advantages=reinforce,
    ),
    Algorithm(
        name="rloo",
        layout=one_policy,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["rloo"],
        scored=("actor", "reference"),
        advantages=rloo,
        least_generations=2,
    ),
)
