"""SuperHF (arXiv 2310.16763): fine-tune on the best of B completions, held near the model it started from.

    y*   = argmax_b r(x, y_b)
    loss = mean over examples of  mean_t -log pi(y*_t) + kl_coef max(mean_t KL(pi_0 || pi)_t, 0)

KL(pi_0 || pi)_t is exact over the vocabulary at each state of y*, from the fused head, so it is never negative but by
rounding. Policy and pi_0 run in one packed call: with adapters, pi_0 is the same base with the adapter off. Both terms
are means over an example's tokens, as the authors' code has them; it sums the KL over the examples of a batch, so that
its weight grows with the batch, and here as in the paper's text it is their mean.
"""

from torch import Tensor

from rlhf_kernels.nn import HydraModel
from rlhf_trainer.algorithms.base import Algorithm, Counts, Loss, best, one_policy, run
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Rollout


def select(rollout: Rollout, config: TrainConfig) -> Tensor:
    """The completion of the highest score of each prompt; the KL has no part in the choice."""
    return best(rollout.scores, config)


def loss(model: HydraModel, batch: Rollout, counts: Counts, config: TrainConfig) -> Loss:
    """Cross-entropy and divergence of the chosen completions, from the same rows."""
    wanted = {"divergence": ("rkl",), "grad_fields": ("logprob", "rkl")}  # rkl: KL(reference || actor)
    out = run(model, batch, ("actor", "reference"), config, **wanted)
    logprobs, divergence = out["actor"].logprob, out["actor"].rkl
    tokens = batch.completion_lengths
    sft = -(batch.per_sequence(logprobs) / tokens).sum() / counts.sequences
    kl = (batch.per_sequence(divergence) / tokens).clamp(min=0).sum() / counts.sequences
    value = sft + (config.kl_coef or 0.0) * kl
    return Loss(value, {"loss/sft": sft.detach(), "loss/kl_avg": kl.detach()}, logprobs.detach())


ROWS = (
    Algorithm(
        name="superhf",
        layout=one_policy,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS["superhf"],
        scored=("actor", "reference"),
        select=select,
        least_generations=2,
        penalised=False,
    ),
)
