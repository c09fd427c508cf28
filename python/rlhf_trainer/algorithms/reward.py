"""The reward model: `-log sigmoid(r(x, y_w) - r(x, y_l))` on the reward head at each completion's last token."""

import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import pack


def preference_loss(chosen: Tensor, rejected: Tensor, counts: Counts) -> Loss:
    """chosen, rejected: rewards [pairs]. The mean over the minibatch's pairs (Bradley-Terry)."""
    margin = chosen - rejected
    value = -F.logsigmoid(margin).sum() / counts.sequences
    metrics = {
        "loss/preference": value.detach(),
        "rewards/accuracies": (margin.detach() > 0).sum() / counts.sequences,
        "rewards/margins": margin.detach().sum() / counts.sequences,
    }
    return Loss(value, metrics)


def loss(model: HydraModel, batch: list, counts: Counts, config: TrainConfig) -> Loss:
    """batch: preferences (prompt, chosen, rejected as token lists). Both sides run in one packed call."""
    rows = [(row.prompt, row.chosen) for row in batch] + [(row.prompt, row.rejected) for row in batch]
    packed = pack(rows, model.device)
    out = model(packed.tokens, packed.lengths, roles=("reward",), prompt_lengths=packed.prompt_lengths)
    chosen, rejected = out["reward"].reward.chunk(2)
    share = preference_loss(chosen, rejected, counts)
    return Loss(share.value, share.metrics | {"loss": share.value.detach()})


def _layout(config: TrainConfig) -> Layout:
    if config.lora_r:
        return Layout({"reward": Role("reward", "reward")}, adapters=("reward",))
    return Layout({"reward": Role(None, "reward")}, trained_bases=("base",))


ROWS = (
    Algorithm(
        name="reward",
        layout=_layout,
        trained=("reward",),
        loss=loss,
        defaults=DEFAULTS["reward"],
        data="preferences",
    ),
)
