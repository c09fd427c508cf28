"""Supervised fine-tuning: cross-entropy on completion tokens, the mean over all of them in the optimiser step."""

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import pack


def loss(model: HydraModel, batch: list, counts: Counts, config: TrainConfig) -> Loss:
    """batch: demonstrations (prompt, completion as token lists)."""
    # without a prompt the first token is what the others are conditioned on
    rows = [(row.prompt, row.completion) if row.prompt else (row.completion[:1], row.completion[1:]) for row in batch]
    packed = pack(rows, model.device)
    out = model(packed.tokens, packed.lengths, roles=("actor",), prompt_lengths=packed.prompt_lengths)
    value = -out["actor"].logprob.sum() / counts.tokens
    return Loss(value, {"loss": value.detach(), "loss/sft": value.detach()})


def _layout(config: TrainConfig) -> Layout:
    if config.lora_r:
        return Layout({"actor": Role("actor", "lm")}, adapters=("actor",))
    return Layout({"actor": Role(None, "lm")}, trained_bases=("base",))


ROWS = (
    Algorithm(
        name="sft",
        layout=_layout,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["sft"],
        data="demonstrations",
    ),
)
