"""The table of algorithms: one row each, by name, from the ROWS of this package's modules."""

import pkgutil
from dataclasses import replace
from importlib import import_module

from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import SIZES, UNSAID
from rlhf_trainer.errors import UserError
from rlhf_trainer.names import ALGORITHMS, ONLINE


def _rows() -> dict[str, Algorithm]:
    """Every row, in the order of `rlhf_trainer.names`."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    rows = {row.name: row for module in modules for row in getattr(module, "ROWS", ())}
    return {name: rows[name] for name in sorted(rows, key=ALGORITHMS.index)}


TABLE: dict[str, Algorithm] = _rows()

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
    score. UserError for fewer samples a prompt than the algorithm can do with, an estimator of a divergence that its
    rewards have not, or a warm-up of a critic that it has not.
    """
    row = find(config.algorithm)
    defaults = UNSAID | dict(row.defaults)
    if config.memory_budget is None:  # else see `budget`
        defaults |= SIZES
    values = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.lora_r and config.lora_alpha is None:
        values["lora_alpha"] = float(config.lora_r)
    filled = replace(config, **values)
    if filled.critic_learning_rate is None:
        filled = replace(filled, critic_learning_rate=filled.learning_rate)
    if config.model == "demo" and config.algorithm in ONLINE and not (config.reward or config.reward_model):
        filled = replace(filled, reward=[DEMO_REWARD])
    if (filled.num_generations or 1) < row.least_generations:
        raise UserError(
            f"num_generations: is {filled.num_generations}; {row.name} compares a prompt's samples and needs at least "
            f"{row.least_generations}"
        )
    if filled.kl_estimator != "kl" and (row.data is not None or not row.penalised):
        raise UserError(f"kl_estimator: {row.name} takes no divergence off its rewards; leave it out")
    if filled.kl_controller != "fixed" and (row.data is not None or not row.penalised):
        raise UserError(f"kl_controller: {row.name} takes no divergence off its rewards; kl_coef stays as it is")
    if filled.critic_warmup_steps and "critic" not in row.trained:
        raise UserError(f"critic_warmup_steps: is {filled.critic_warmup_steps}; {row.name} has no critic")
    return filled
