"""PE-RLHF (PERL, arXiv 2403.10704): the reward model is an adapter, the policy is another, on one frozen base.

    A_t  = Z_t - V(s_t),   Z_t = sum_{s >= t} gamma^(s - t) R_s,   R_s = -kl_coef d_s + [last token] score
    loss = -mean_b sum_t A_t log pi(y_t) + vf_coef 1/2 mean_t (V(s_t) - Z_t)^2          (A and Z detached)

REINFORCE with a learned baseline, no ratio and no clipping. V is a head on the policy's own hidden states, so it costs
no rows of its own; it starts at zero. Stage one is `reward` with lora_r > 0 on the same `model`; its output_dir is
`reward_model` here. Reward rows run through that adapter, reference rows through none, the policy's through "actor":
one packed call, one base.
"""

from rlhf_kernels import gae
from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss, State, run
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def advantages(rollout: Rollout, config: TrainConfig, state: State) -> None:
    """Returns from each token on, and what they are above the baseline: GAE with lambda 1."""
    rollout.advantages, rollout.returns = gae(
        rollout.rewards, rollout.values, lengths=rollout.completion_lengths, gamma=config.gamma, lam=1.0
    )


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """Advantage-weighted log-likelihood and the baseline's squared error, from one pass over the policy's rows."""
    out = run(model, batch, ("actor", "critic"), config)
    logprobs, values = out["actor"].logprob, out["critic"].value
    count = counts.sequences if config.loss == "sequence" else counts.tokens
    policy = -(batch.advantages * logprobs).sum() / count
    value = 0.5 * ((values - batch.returns) ** 2).sum() / counts.tokens
    metrics = {"loss/policy_avg": policy.detach(), "loss/value_avg": value.detach()}
    return Loss(policy + (config.vf_coef or 0.0) * value, metrics, logprobs.detach())


def _layout(config: TrainConfig) -> Layout:
    """A reward that is a function needs no reward adapter."""
    roles = {"actor": Role("actor", "lm"), "critic": Role("actor", "value"), "reference": Role(None, "lm")}
    if config.reward:
        return Layout(roles, adapters=("actor",))
    roles["reward"] = Role("reward", "reward")
    return Layout(roles, adapters=("actor", "reward"), loaded={"reward": "reward_model"})


ROWS = (
    Algorithm(
        name="pe-rlhf",
        layout=_layout,
        trained=("actor", "critic"),
        loss=loss,
        defaults=DEFAULTS["pe-rlhf"],
        scored=("actor", "reference", "critic"),
        advantages=advantages,
    ),
)
