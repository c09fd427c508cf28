"""Hydra-SFT (arXiv 2309.00754): one decoder with an LM head and a reward head, trained on both at once.

    loss = CE(y_w | x) + reward_loss_coef * -log sigmoid(r(x, y_w) - r(x, y_l))

The frozen result is the base of the Hydra algorithms: `model` of hydra-ppo and the others.
"""

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss
from rlhf_trainer.algorithms.reward import preference_loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import pack


def loss(model: HydraModel, batch: list, counts: Counts, config: TrainConfig) -> Loss:
    """batch: preferences. Chosen rows feed both heads in one pass; rejected rows need no vocabulary head."""
    chosen = pack([(row.prompt, row.chosen) for row in batch], model.device)
    rejected = pack([(row.prompt, row.rejected) for row in batch], model.device)
    won = model(chosen.tokens, chosen.lengths, roles=("actor", "reward"), prompt_lengths=chosen.prompt_lengths)
    lost = model(rejected.tokens, rejected.lengths, roles=("reward",), prompt_lengths=rejected.prompt_lengths)
    sft = -won["actor"].logprob.sum() / counts.tokens
    preference = preference_loss(won["reward"].reward, lost["reward"].reward, counts)
    value = sft + config.reward_loss_coef * preference.value
    return Loss(value, preference.metrics | {"loss": value.detach(), "loss/sft": sft.detach()})


def _layout(config: TrainConfig) -> Layout:
    return Layout({"actor": Role(None, "lm"), "reward": Role(None, "reward")}, trained_bases=("base",))


ROWS = (
    Algorithm(
        name="hydra-sft",
        layout=_layout,
        trained=("actor", "reward"),
        loss=loss,
        defaults=DEFAULTS["hydra-sft"],
        data="preferences",
    ),
)
