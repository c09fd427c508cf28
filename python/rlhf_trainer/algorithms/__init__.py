"""The table of algorithms: one row each, registered by name."""

from dataclasses import replace

from rlhf_trainer.algorithms import dpo, hydra_sft, ppo, remax, reward, sft
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss
from rlhf_trainer.config import ONLINE, TrainConfig

TABLE: dict[str, Algorithm] = {row.name: row for module in (sft, reward, hydra_sft, dpo, ppo, remax) for row in module.ROWS}

DEMO_REWARD = "rlhf_trainer.demo.gold:reward"

__all__ = ["TABLE", "Algorithm", "Counts", "Layout", "Loss", "find", "with_defaults"]


def find(name: str) -> Algorithm:
    """The row called `name`; ValueError otherwise."""
    if name not in TABLE:
        raise ValueError(f"algorithm: {name!r} is unknown; it must be one of {', '.join(TABLE)}")
    return TABLE[name]


def with_defaults(config: TrainConfig) -> TrainConfig:
    """A copy of `config` whose None fields hold the algorithm's own values; the critic learns at the actor's rate.

    A rank without an alpha gets alpha = rank (scaling 1); the embedded checkpoint, which has no reward head, its gold
    score.
    """
    row = find(config.algorithm)
    values = {name: value for name, value in row.defaults.items() if getattr(config, name) is None}
    if config.lora_r and config.lora_alpha is None:
        values["lora_alpha"] = float(config.lora_r)
    filled = replace(config, **values)
    if filled.critic_learning_rate is None:
        filled = replace(filled, critic_learning_rate=filled.learning_rate)
    if config.model == "demo" and config.algorithm in ONLINE and not (config.reward or config.reward_model):
        filled = replace(filled, reward=[DEMO_REWARD])
    return filled
