"""PPO and its low-memory layouts: PPO, LoRA-PPO, J-Hydra-PPO and Hydra-PPO differ in which models play the roles.

    ratio = exp(logprob - old logprob)
    policy = mean max(-A ratio, -A clip(ratio, 1 - c, 1 + c))
    value = 1/2 mean max((v - R)^2, (clip(v, old +- c_v) - R)^2)
    loss = policy + vf_coef value;  A, R from GAE on per-token rewards  -kl_coef d_t + [last token] score
    A is whitened, then clipped to +-advantage_clip

Sources: PPO arXiv 1707.06347, lm-human-preferences; Hydra-RLHF arXiv 2309.00754.
"""

import torch

from rlhf_kernels import gae, masked_whiten
from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss, Source, State, run
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def advantages(rollout: Rollout, config: TrainConfig, state: State) -> None:
    """GAE over each completion, whose last token is terminal; whitening is over all tokens of the rollout."""
    rewards = rollout.rewards
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, shift_mean=False)
    rollout.advantages, rollout.returns = gae(
        rewards, rollout.values, lengths=rollout.completion_lengths, gamma=config.gamma, lam=config.lam
    )
    if config.whiten_advantages:
        rollout.advantages = masked_whiten(rollout.advantages)
    if config.advantage_clip is not None:
        rollout.advantages = rollout.advantages.clamp(-config.advantage_clip, config.advantage_clip)


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """Clipped policy and value losses; actor and critic run in one packed call."""
    out = run(model, batch, ("actor", "critic"), config)
    logprobs, values = out["actor"].logprob, out["critic"].value
    log_ratio = logprobs - batch.logprobs
    ratio = log_ratio.exp()
    unclipped = -batch.advantages * ratio
    clipped = -batch.advantages * ratio.clamp(1 - config.cliprange, 1 + config.cliprange)
    policy = torch.maximum(unclipped, clipped).sum() / counts.tokens

    bounded = batch.values + (values - batch.values).clamp(-config.cliprange_value, config.cliprange_value)
    error, bounded_error = (values - batch.returns) ** 2, (bounded - batch.returns) ** 2
    value = 0.5 * torch.maximum(error, bounded_error).sum() / counts.tokens

    with torch.no_grad():
        metrics = {
            "loss/policy_avg": policy.detach(),
            "loss/value_avg": value.detach(),
            "policy/approxkl_avg": 0.5 * (log_ratio**2).sum() / counts.tokens,
            "policy/clipfrac_avg": (clipped > unclipped).sum() / counts.tokens,
            "val/clipfrac_avg": (bounded_error > error).sum() / counts.tokens,
            "val/ratio": ratio.sum() / counts.tokens,
        }
    return Loss(policy + (config.vf_coef or 0.0) * value, metrics, logprobs.detach())


def _one_base(actor: str, critic: str) -> Layout:
    """One frozen base; `actor` and `critic` are adapters, which may be the same."""
    roles = {
        "actor": Role(actor, "lm"),
        "critic": Role(critic, "value"),
        "reference": Role(None, "lm"),
        "reward": Role(None, "reward"),
    }
    return Layout(roles, adapters=tuple(dict.fromkeys((actor, critic))), head_start="reward")


def hydra(config: TrainConfig) -> Layout:
    return _one_base("actor", "critic")


def _joint(config: TrainConfig) -> Layout:
    return _one_base("joint", "joint")


def _four_bases(config: TrainConfig, adapters: bool) -> Layout:
    """Four copies; the critic starts from the reward model. Rewards from functions need no fourth copy."""
    roles = {
        "actor": Role("actor" if adapters else None, "lm"),
        "critic": Role("critic" if adapters else None, "value", "critic"),
        "reference": Role(None, "lm", "reference"),
        "critic_start": Role(None, "reward", "critic"),
    }
    if not config.reward:
        roles["reward"] = Role(None, "reward", "reward")
    bases: dict[str, Source] = {"critic": "reward_model", "reference": "model"}
    if "reward" in roles:
        bases["reward"] = "reward_model"
    return Layout(
        roles,
        adapters=("actor", "critic") if adapters else (),
        bases=bases,
        trained_bases=() if adapters else ("base", "critic"),
        head_start="critic_start",
        head_source="reward_model",
    )


def _lora(config: TrainConfig) -> Layout:
    return _four_bases(config, adapters=True)


def whole(config: TrainConfig) -> Layout:
    return _four_bases(config, adapters=False)


def _row(name: str, layout) -> Algorithm:
    return Algorithm(
        name=name,
        layout=layout,
        trained=("actor", "critic"),
        loss=loss,
        defaults=DEFAULTS[name],
        scored=("actor", "reference", "critic"),
        advantages=advantages,
    )


ROWS = (
    _row("ppo", whole),  # four full models, actor and critic trained
    _row("lora-ppo", _lora),  # four frozen bases, adapters on actor and critic
    _row("j-hydra-ppo", _joint),  # one base, one adapter for actor and critic
    _row("hydra-ppo", hydra),  # one base, an adapter each for actor and critic
)
