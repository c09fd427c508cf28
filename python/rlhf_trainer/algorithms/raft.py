"""RAFT (arXiv 2304.06767): sample K completions a prompt, keep the best, fine-tune on them, repeat.

    y*   = argmax_k R(x, y_k),   R = r - kl_coef sum_t d_t
    loss = -mean over the tokens of all y* of log pi(y*_t)

The paper ranks by the reward alone (kl_coef 0, the default) or by the reward less the KL. The reference is needed for
that alone: a whole trained base with rewards from functions and kl_coef 0 has no copy beside it, and no KL is logged.
"""

from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss, best, one_policy, run
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def select(rollout: Rollout, config: TrainConfig) -> Tensor:
    """The completion of the highest return of each prompt."""
    return best(rollout.per_sequence(rollout.rewards), config)


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """Cross-entropy of the chosen completions."""
    out = run(model, batch, ("actor",), config)
    logprobs = out["actor"].logprob
    value = -logprobs.sum() / counts.tokens
    return Loss(value, {"loss/sft": value.detach()}, logprobs.detach())


def _layout(config: TrainConfig) -> Layout:
    if config.lora_r or config.kl_coef or not config.reward:
        return one_policy(config)
    return Layout({"actor": Role(None, "lm")}, trained_bases=("base",))


ROWS = (
    Algorithm(
        name="raft",
        layout=_layout,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["raft"],
        scored=("actor", "reference"),
        select=select,
        least_generations=2,
    ),
)
