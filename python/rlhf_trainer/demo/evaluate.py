"""Gold score on held-out prompts, before and after, with the controls that tell a gain from a trick.

rise      difference of the mean gold scores, in standard deviations of the SFT model's samples
length    the same for SFT samples cut or padded, word for word, to the trained policy's lengths
distinct  distinct word pairs over all of them (over SFT's)
nll       nats a token under the SFT model (less SFT's own)
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec, Role
from rlhf_trainer.demo import data_path
from rlhf_trainer.demo.gold import Gold, distinct_2, embedded, words
from rlhf_trainer.demo.settings import ADAPTERS, EVAL_PROMPTS, MAX_COMPLETION
from rlhf_trainer.rollout import pack

LENGTH_LIMIT, LEAST_DISTINCT, NLL_LIMIT = 0.2, 0.7, 1.0  # of a rise that is no trick

SEED = 20_240_601  # of the evaluation's draws: the same prompts and streams for every model


@dataclass
class Sampled:
    """Completions of the held-out prompts by one policy, and what is measured on each; `nll` is nats a token."""

    prompts: list[str]
    texts: list[str]
    ended: list[bool]
    tokens: list[int]
    gold: list[float]
    reward: list[float]
    nll: float
    distinct: float


@dataclass
class Comparison:
    """A trained policy beside the SFT model it started from; the module's docstring says what the fields are."""

    gold_before: float
    gold_after: float
    gold_std: float
    rise: float
    length_control: float
    distinct_ratio: float
    nll_rise: float
    reward_before: float
    reward_after: float
    tokens_before: float
    tokens_after: float
    ended_before: float
    ended_after: float

    def passed(self, least_rise: float = 1.0) -> bool:
        """Whether the rise is there and is no trick of length, repetition or broken text."""
        varied = self.length_control < LENGTH_LIMIT and self.distinct_ratio >= LEAST_DISTINCT
        return self.rise >= least_rise and varied and self.nll_rise <= NLL_LIMIT

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def load_sft(base: Path) -> HydraModel:
    """The frozen Hydra-SFT model: it samples, and it tells rewards and likelihoods of anyone's samples."""
    roles = {"actor": Role(None, "lm"), "reward": Role(None, "reward")}
    return HydraModel.from_pretrained(base, roles=roles, dtype=torch.float32)


def load_policy(base: Path, output_dir: Path) -> HydraModel:
    """The policy that a run left in `output_dir`: a whole model, or an adapter on `base`."""
    if (output_dir / "config.json").is_file():
        return HydraModel.from_pretrained(output_dir, roles={"actor": Role(None, "lm")}, dtype=torch.float32)
    name = "joint" if (output_dir / "joint").is_dir() else "actor"
    spec = LoraSpec(r=ADAPTERS["lora_r"], alpha=ADAPTERS["lora_alpha"])
    model = HydraModel.from_pretrained(base, {name: spec}, {"actor": Role(name, "lm")}, dtype=torch.float32)
    model.load_adapters(output_dir)
    return model


@torch.no_grad()
def sample(policy: HydraModel, sft: HydraModel, tokenizer: Any, prompts: list[str]) -> Sampled:
    """One completion of each prompt by `policy`, scored by gold and by the SFT model's two heads."""
    encoded = [tokenizer(p).input_ids for p in prompts]
    params = SamplingParams(max_new_tokens=MAX_COMPLETION, stop_token_ids=(tokenizer.eos_token_id,), seed=SEED)
    rollouts = SlicedGenerator(policy, "32MiB").generate(encoded, params, role="actor")
    texts = [tokenizer.decode(r.tokens, skip_special_tokens=True) for r in rollouts]
    ended = [r.finish_reason != "length" for r in rollouts]
    rewards: list[float] = []
    loss, count = 0.0, 0
    for start in range(0, len(rollouts), 64):
        part = pack([(encoded[r.prompt_index], r.tokens) for r in rollouts[start : start + 64]])
        out = sft.score(part.tokens, part.lengths, ("actor", "reward"), part.prompt_lengths)
        scores, logprobs = out["reward"].reward, out["actor"].logprob
        assert scores is not None
        assert logprobs is not None
        rewards += scores.tolist()
        loss -= float(logprobs.sum())
        count += logprobs.numel()
    gold = embedded()
    return Sampled(
        prompts=prompts,
        texts=texts,
        ended=ended,
        tokens=[len(r.tokens) for r in rollouts],
        gold=[gold.score(*row) for row in zip(prompts, texts, ended)],
        reward=rewards,
        nll=loss / count,
        distinct=distinct_2(texts),
    )


def at_length(texts: list[str], number: int, length: int) -> str:
    """Text `number` cut to `length` words, or padded to it with the texts that follow; it keeps its full stop."""
    said, following = texts[number].rstrip(" .").split(), number
    while len(said) < length:
        following = (following + 1) % len(texts)
        said += texts[following].rstrip(" .").split()
    return " " + " ".join(said[:length]) + "."


def length_gain(before: Sampled, after: Sampled, gold: Gold) -> float:
    """What the lengths alone gain, in gold points: SFT's texts at the policy's lengths, all of them ended."""
    lengths = [len(text.split()) for text in after.texts]
    texts = [at_length(before.texts, i, max(length, 1)) for i, length in enumerate(lengths)]
    scores = [gold.score(p, t, True) if words(t) else 0.0 for p, t in zip(before.prompts, texts)]
    return fmean(scores) - fmean(before.gold)


def compare(before: Sampled, after: Sampled) -> Comparison:
    """before: the SFT model's samples; after: the trained policy's, of the same prompts."""
    spread = pstdev(before.gold)
    return Comparison(
        gold_before=fmean(before.gold),
        gold_after=fmean(after.gold),
        gold_std=spread,
        rise=(fmean(after.gold) - fmean(before.gold)) / spread,
        length_control=length_gain(before, after, embedded()) / spread,
        distinct_ratio=after.distinct / before.distinct,
        nll_rise=after.nll - before.nll,
        reward_before=fmean(before.reward),
        reward_after=fmean(after.reward),
        tokens_before=fmean(before.tokens),
        tokens_after=fmean(after.tokens),
        ended_before=fmean(map(float, before.ended)),
        ended_after=fmean(map(float, after.ended)),
    )


def held_out_prompts() -> list[str]:
    """The 256 prompts of the evaluation."""
    lines = Path(data_path("eval_prompts")).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:EVAL_PROMPTS]]
