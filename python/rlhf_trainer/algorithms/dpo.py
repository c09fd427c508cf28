"""DPO (arXiv 2305.18290) and R-DPO (arXiv 2403.19159): the policy learns from preference pairs, without sampling.

    h    = [log pi(y_w) - log pi(y_l)] - [log pi_ref(y_w) - log pi_ref(y_l)]     (sums over completion tokens)
    z    = beta h + length_coef (|y_w| - |y_l|)                                  (dpo: no length term)
    loss = -(1 - label_smoothing) log sigmoid(z) - label_smoothing log sigmoid(-z)

`length_coef` > 0 penalises length: a pair that length alone explains has a small loss before anything is learned.
Both completions run through policy and reference in one packed call, where the reference is the base with the adapter
off (a frozen copy with `lora_r` 0); `precompute_ref_logprobs` reads the reference once, before the first step.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.nn import HydraModel, Role
from rlhf_trainer.algorithms.base import Algorithm, Counts, Layout, Loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import Preference
from rlhf_trainer.defaults import DEFAULTS
from rlhf_trainer.rollout import Packed, pack


def pack_pairs(batch: list[Preference], device: torch.device) -> Packed:
    """All chosen rows, then all rejected ones."""
    chosen = [(row.prompt, row.chosen) for row in batch]
    return pack(chosen + [(row.prompt, row.rejected) for row in batch], device)


def pair_logprobs(per_token: Tensor, packed: Packed) -> Tensor:
    """Completion logprobs [T] of `pack_pairs` -> their sums [2, pairs]: chosen, rejected."""
    return packed.per_sequence(per_token).view(2, -1)


def pair_loss(policy: Tensor, reference: Tensor, lengths: Tensor, counts: Counts, config: TrainConfig) -> Loss:
    """The mean over the minibatch's pairs. policy, reference: log pi [2, pairs]; lengths: |y| [2, pairs], integers."""
    rewards = config.beta * (policy - reference)
    z = rewards[0] - rewards[1]
    if config.algorithm == "r-dpo":
        tokens = lengths.float()
        z = z + config.length_coef * (tokens[0] - tokens[1])
    smoothing = config.label_smoothing
    value = -((1 - smoothing) * F.logsigmoid(z) + smoothing * F.logsigmoid(-z)).sum() / counts.sequences
    policy, rewards = policy.detach(), rewards.detach()
    margin = rewards[0] - rewards[1]
    metrics = {
        "loss": value.detach(),
        "rewards/chosen": rewards[0].sum() / counts.sequences,
        "rewards/rejected": rewards[1].sum() / counts.sequences,
        "rewards/margins": margin.sum() / counts.sequences,
        "rewards/accuracies": (margin > 0).sum() / counts.sequences,
        "logps/chosen": policy[0].sum() / counts.sequences,
        "logps/rejected": policy[1].sum() / counts.sequences,
    }
    return Loss(value, metrics)


def loss(model: HydraModel, batch: list[Preference], counts: Counts, config: TrainConfig) -> Loss:
    """batch: preferences (prompt, chosen, rejected as token lists)."""
    packed = pack_pairs(batch, model.device)
    roles = ("actor",) if config.precompute_ref_logprobs else ("actor", "reference")
    out = model(packed.tokens, packed.lengths, roles=roles, prompt_lengths=packed.prompt_lengths)
    policy = pair_logprobs(out["actor"].logprob, packed)
    if config.precompute_ref_logprobs:
        reference = torch.tensor([row.ref_logprobs for row in batch], device=model.device).T
    else:
        reference = pair_logprobs(out["reference"].logprob, packed).detach()
    return pair_loss(policy, reference, packed.completion_lengths.view(2, -1), counts, config)


def prepare(model: HydraModel, rows: list[Preference], config: TrainConfig) -> list[Preference]:
    """With `precompute_ref_logprobs`: the rows with the reference's logprobs, from micro-batches in the file's order.

    The order makes them the same in a resumed run. Without adapters the untrained policy is the reference.
    """
    if not config.precompute_ref_logprobs:
        return rows
    role, size = "reference" if config.lora_r else "actor", config.micro_batch
    found: list[Preference] = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        packed = pack_pairs(part, model.device)
        out = model.score(packed.tokens, packed.lengths, roles=(role,), prompt_lengths=packed.prompt_lengths)
        logprobs = out[role].logprob
        assert logprobs is not None
        sums = pair_logprobs(logprobs, packed).T.tolist()
        found += [replace(row, ref_logprobs=(won, lost)) for row, (won, lost) in zip(part, sums)]
    return found


def _layout(config: TrainConfig) -> Layout:
    if config.lora_r:
        return Layout({"actor": Role("actor", "lm"), "reference": Role(None, "lm")}, adapters=("actor",))
    if config.precompute_ref_logprobs:
        return Layout({"actor": Role(None, "lm")}, trained_bases=("base",))
    roles = {"actor": Role(None, "lm"), "reference": Role(None, "lm", "reference")}
    return Layout(roles, bases={"reference": "model"}, trained_bases=("base",))


def _row(name: str) -> Algorithm:
    return Algorithm(
        name=name,
        layout=_layout,
        trained=("actor",),
        loss=loss,
        defaults=DEFAULTS[name],
        data="preferences",
        prepare=prepare,
    )


ROWS = (_row("dpo"), _row("r-dpo"))
