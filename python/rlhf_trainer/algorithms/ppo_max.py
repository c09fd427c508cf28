"""PPO-max (arXiv 2307.04964): PPO with everything that the paper found to keep it from falling over.

    score = clip((r - mean) / std, +-reward_clip)      mean and std of all rewards of the run so far, this rollout's too
    A     = clip(whiten(GAE), +-advantage_clip)        on rewards  -kl_coef d_t + [last token] score
    loss  = policy + vf_coef value (both clipped) + ptx_coef CE(demonstrations)

The critic starts as the reward model and is trained alone for the first critic_warmup_steps steps: it must learn the
normalised rewards before the policy listens to it. Four whole models as in the paper, or with lora_r > 0 the layout of
Hydra-PPO: one base, an adapter each for actor and critic.
"""

import math

from torch import Tensor

from rlhf_trainer.algorithms import ppo
from rlhf_trainer.algorithms.base import Algorithm, Layout, State
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS

STD_FLOOR = 1e-4  # rewards that do not vary say nothing: they must not become large numbers


def normalize(scores: Tensor, state: State, config: TrainConfig) -> Tensor:
    """Scores [N] less the mean of all seen so far, over their standard deviation; `state` counts them in first.

    Mean and sum of squared deviations are merged in float64 (Chan et al.), so no score needs to be kept.
    """
    batch = scores.double()
    count, mean, squares = (state.get(name, 0.0) for name in ("reward_count", "reward_mean", "reward_squares"))
    total = count + len(scores)
    step = float(batch.mean()) - mean
    squares += float(batch.var(correction=0)) * len(scores) + step**2 * count * len(scores) / total
    mean += step * len(scores) / total
    state |= {"reward_count": total, "reward_mean": mean, "reward_squares": squares}
    return ((batch - mean) / max(math.sqrt(squares / total), STD_FLOOR)).float()


def _layout(config: TrainConfig) -> Layout:
    return ppo.hydra(config) if config.lora_r else ppo.whole(config)


ROWS = (
    Algorithm(
        name="ppo-max",
        layout=_layout,
        trained=("actor", "critic"),
        loss=ppo.loss,
        defaults=DEFAULTS["ppo-max"],
        scored=("actor", "reference", "critic"),
        advantages=ppo.advantages,
        normalize=normalize,
    ),
)
