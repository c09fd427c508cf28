"""ReMax (arXiv 2310.10505): policy gradient with the reward of the greedy completion as the baseline.

    loss = -mean_b sum_t A_t log pi(y_t),   A_t = r(x, y) - r(x, y_greedy) - kl_coef sum_{s >= t} d_s   (detached)

No critic, no ratio, no clipping; the baseline carries no KL. `kl_mode="one-step"` keeps only d_t, and
`loss="token-mean"` divides by tokens instead of sequences: both as in the authors' repository.
The paper trains every parameter beside a frozen reference copy; with `lora_r` > 0 the policy is an adapter on one base
and the reference is that base with the adapter off.
"""

from rlhf_kernels import gae
from rlhf_trainer.algorithms.base import Algorithm, State, one_policy
from rlhf_trainer.algorithms.reinforce import loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def advantages(rollout: Rollout, config: TrainConfig, state: State) -> None:
    """Reward above the greedy completion's, less the KL penalty from each token on."""
    penalty = rollout.penalties
    if config.kl_mode == "cumulative":  # sum over s >= t: GAE with gamma = lambda = 1 and no values
        penalty, _ = gae(penalty, penalty * 0, lengths=rollout.completion_lengths, gamma=1.0, lam=1.0)
    gain = rollout.scores - rollout.baselines
    rollout.advantages = penalty + gain.repeat_interleave(rollout.completion_lengths)


ROWS = (
    Algorithm(
        name="remax",
        layout=one_policy,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["remax"],
        scored=("actor", "reference"),
        advantages=advantages,
        greedy_baseline=True,
    ),
)
