"""Rollouts: sequences end to end in flat tensors, no padding, and how they are sampled and read by the models.

Per-token fields are fp32 and cover completion tokens only, in the order of the sequences; `values[t]` and `logprobs[t]`
belong to the state before token t. The 'old' logprobs of the ratio are those recomputed while scoring, in one call with
the reference's: they are computed as the update computes them, so the first ratio is 1 and the KL at step 0 exactly 0,
in bf16 too. What sampling captured is kept beside them, for the check `sampling/logp_difference_max`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.generation import Rollout as GeneratedRollout
from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.processes import ALONE

PER_TOKEN = (
    "captured",
    "logprobs",
    "ref_logprobs",
    "snapshot_logprobs",
    "values",
    "entropies",
    "divergences",
    "penalties",
    "rewards",
    "advantages",
    "returns",
)

GROUPS = 32  # in which a rollout's completions are handed out: often enough to watch, seldom enough to cost nothing

UNFILLED = torch.empty(0)


@dataclass
class Packed:
    """Sequences end to end: tokens int64 [sum of lengths], the lengths and how much of each is prompt, int64 [B]."""

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def completion_lengths(self) -> Tensor:
        return self.lengths - self.prompt_lengths

    def per_sequence(self, per_token: Tensor) -> Tensor:
        """Sums a [T] field over each completion: [B]."""
        owner = torch.repeat_interleave(torch.arange(len(self), device=per_token.device), self.completion_lengths)
        return per_token.new_zeros(len(self)).index_add(0, owner, per_token)


def pack(rows: Sequence[tuple[list[int], list[int]]], device: torch.device | str = "cpu") -> Packed:
    """Lays (prompt, completion) pairs end to end."""
    flat = [token for prompt, completion in rows for token in (*prompt, *completion)]
    return Packed(
        torch.tensor(flat, dtype=torch.int64, device=device),
        torch.tensor([len(prompt) + len(completion) for prompt, completion in rows], device=device),
        torch.tensor([len(prompt) for prompt, _ in rows], device=device),
    )


@dataclass
class Rollout(Packed):
    """Completions with everything learned about them. [N] is per sequence, [T] per completion token."""

    prompt_index: Tensor  # int64 [N]: which prompt of the step
    finished: Tensor  # bool [N]: ended by itself, not by max_completion_length
    captured: Tensor  # [T] logprobs as sampled
    scores: Tensor  # [N] after clipping and the missing-EOS penalty
    baselines: Tensor  # [N] score of the same prompt's greedy completion; zeros without one
    logprobs: Tensor = UNFILLED
    ref_logprobs: Tensor = UNFILLED
    snapshot_logprobs: Tensor = UNFILLED
    values: Tensor = UNFILLED
    entropies: Tensor = UNFILLED
    divergences: Tensor = UNFILLED  # exact KL or JS over the vocabulary, when the estimator asks for it
    penalties: Tensor = UNFILLED  # -kl_coef d_t
    rewards: Tensor = UNFILLED  # penalties, and the score at the last token
    advantages: Tensor = UNFILLED
    returns: Tensor = UNFILLED

    def select(self, index: Tensor) -> "Rollout":
        """The sequences at `index` (int64 [M]), in that order."""
        where_tokens = _ranges(self.lengths, index)
        where_completion = _ranges(self.completion_lengths, index)
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not UNFILLED:
                where = index
                if field.name == "tokens":
                    where = where_tokens
                elif field.name in PER_TOKEN:
                    where = where_completion
                value = value[where]
            chosen[field.name] = value
        return Rollout(**chosen)

    def to(self, device: torch.device | str) -> "Rollout":
        """The same on another device."""
        return Rollout(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def joined(parts: Sequence[tuple[int, Rollout]]) -> Rollout:
    """Rollouts of neighbouring shares of a step's prompts as one, each with the number of its first prompt."""
    whole: dict[str, Any] = {}
    for field in fields(Rollout):
        found = torch.cat([getattr(part, field.name) for _, part in parts])
        whole[field.name] = found if found.numel() else UNFILLED
    whole["prompt_index"] = torch.cat([first + part.prompt_index for first, part in parts])
    return Rollout(**whole)


def _ranges(lengths: Tensor, index: Tensor) -> Tensor:
    """Flat positions of the pieces `index` of a row cut into pieces of `lengths`."""
    starts = (lengths.cumsum(0) - lengths)[index]
    chosen = lengths[index]
    shifts = starts - (chosen.cumsum(0) - chosen)
    return torch.arange(int(chosen.sum()), device=lengths.device) + shifts.repeat_interleave(chosen)


def sampling_params(config: TrainConfig, end_tokens: Sequence[int] = (), **changes: Any) -> SamplingParams:
    """What the configuration says about sampling; `end_tokens` end a completion too."""
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "min_p": config.min_p,
        "n": config.num_generations or 1,
        "stop_token_ids": tuple(dict.fromkeys((*config.stop_token_ids, *end_tokens))),
        "seed": config.seed,
    }
    return SamplingParams(**(settings | changes))


def sample(
    generator: SlicedGenerator,
    prompts: list[list[int]],
    params: SamplingParams,
    streams: list[int],
    device: torch.device,
    finished: Callable[[GeneratedRollout], None] = lambda row: None,
    role: str = "actor",
) -> tuple[Rollout, Rollout | None]:
    """The sampled completions, and with `greedy_baseline` the greedy ones (one a prompt); scores are still zero.

    finished: called with every completion soon after it is done. The KV arena's bytes are given back at the end, also
    when that raises.
    """
    rows = []
    every = max(1, len(prompts) * params.rollouts // GROUPS)
    try:
        for row in generator.stream(prompts, params, role=role, streams=streams, every=every):
            rows.append(row)
            finished(row)
    finally:
        generator.close()
        generator.sleep()
    rows.sort(key=lambda row: (row.prompt_index, row.sample_index))
    sampled = _gather(prompts, [row for row in rows if not row.greedy or not params.greedy_baseline], device)
    greedy = [row for row in rows if row.greedy] if params.greedy_baseline else []
    return sampled, _gather(prompts, greedy, device) if greedy else None


def _gather(prompts: list[list[int]], rows: list, device: torch.device) -> Rollout:
    packed = pack([(prompts[row.prompt_index], row.tokens) for row in rows], device)
    zeros = torch.zeros(len(rows), device=device)
    return Rollout(
        **vars(packed),
        prompt_index=torch.tensor([row.prompt_index for row in rows], device=device),
        finished=torch.tensor([row.finish_reason != "length" for row in rows], device=device),
        captured=torch.tensor([x for row in rows for x in row.logprobs], dtype=torch.float32, device=device),
        scores=zeros,
        baselines=zeros.clone(),
    )


# role -> which field of the rollout each field of its output fills
_READ = {
    "actor": {"logprobs": "logprob", "entropies": "entropy"},
    "reference": {"ref_logprobs": "logprob"},
    "snapshot": {"snapshot_logprobs": "logprob"},
    "critic": {"values": "value"},
    "reward": {"scores": "reward"},
}


def read(
    model: HydraModel,
    rollout: Rollout,
    roles: Sequence[str],
    config: TrainConfig,
    divergence: str | None = None,
    most: int = 0,
) -> None:
    """Fills what `roles` say of every sequence: logprobs, values and, for "reward", `scores`. One call a micro-batch.

    divergence: "kl" or "js", the exact one between actor and reference over the vocabulary. most: of the processes
    that share a sharded model, the most sequences any has; then all call it equally often.
    """
    found: dict[str, list[Tensor]] = {}
    every = torch.arange(len(rollout), device=rollout.lengths.device)
    for index, counted in ALONE.pieces(every, config.micro_batch, most, even=most > 0):
        part = rollout.select(index)
        out = model.score(
            part.tokens,
            part.lengths,
            roles=tuple(roles),
            prompt_lengths=part.prompt_lengths,
            temperature=config.temperature,
            entropy="actor" in roles,
            divergence=(divergence,) if divergence else (),
        )
        if not counted:
            continue
        wanted = [(role, *pair) for role in roles for pair in _READ[role].items()]
        if divergence:
            wanted.append(("actor", "divergences", divergence))
        for role, name, source in wanted:
            found.setdefault(name, []).append(getattr(out[role], source))
    for name, parts in found.items():
        setattr(rollout, name, torch.cat(parts))


def completions(rollout: Rollout, decode: Callable[[list[int]], str]) -> list[str]:
    """The text of each completion."""
    texts, start = [], 0
    tokens = rollout.tokens.tolist()
    for length, prompt in zip(rollout.lengths.tolist(), rollout.prompt_lengths.tolist()):
        texts.append(decode(tokens[start + prompt : start + length]))
        start += length
    return texts
