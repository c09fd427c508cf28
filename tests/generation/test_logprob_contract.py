"""What a rollout records is what training recomputes: the logprob at the temperature over the whole vocabulary.

In fp32 to max(1e-5, 4e-6 standard deviations of the logits). In bf16 the measure is transformers itself: how far its
own cached decode is from its own full forward on the same tokens, and how far both are from the same model in fp64.
"""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from architectures import CONFIGS, build
from generation_models import NAMES, generator, model, prompts, record_logits

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec

LENGTHS = [1, 3, 17, 8, 29, 12, 40, 5]  # several times the windows of 6 and 9
NEW = 16
EACH = [
    SamplingParams(NEW, temperature=0.0),
    SamplingParams(NEW, temperature=1.0),
    SamplingParams(NEW, temperature=0.6, greedy_baseline=True),
    SamplingParams(NEW, temperature=1.7, n=2),
    SamplingParams(NEW, temperature=0.8, top_k=5),
    SamplingParams(NEW, temperature=1.3, top_p=0.8),
    SamplingParams(NEW, temperature=0.9, min_p=0.05),
    SamplingParams(NEW, temperature=1.1, top_k=30, top_p=0.9, min_p=0.02, greedy_baseline=True),
]


def logprobs(logits: torch.Tensor, tokens: list[int], temperature: float) -> torch.Tensor:
    rows = logits.double() / (temperature or 1.0)
    return rows.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def full(lm, prompt, tokens) -> torch.Tensor:
    """The logits of `tokens` in one forward of the plain model."""
    return lm(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def cached(lm, prompt, tokens) -> torch.Tensor:
    """The same as transformers decodes them: the prompt, then one token at a time through its cache."""
    out = lm(torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in tokens[:-1]:
        out = lm(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("sharpness", [1.0, 30.0], ids=["flat", "sharp"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_fp32_logits_and_logprobs_are_those_of_the_plain_model(name, sharpness, monkeypatch):
    """Logits too, at every decode step: tokens alone do not see a window that is off by one."""
    lm, given = model(name), prompts(LENGTHS)
    lm.get_output_embeddings().weight *= sharpness
    found = record_logits(monkeypatch)
    for r in generator(lm, 60, step_tokens=19).generate(given, EACH):
        params = EACH[r.prompt_index]
        want = full(lm, given[r.prompt_index], r.tokens)
        scale = sharpness if name == "gemma2" else want.std().item()  # its softcap hides how large the logits were
        bound = max(1e-5, 4e-6 * scale / min(params.temperature or 1.0, 1.0))
        difference = torch.tensor(r.logprobs).double() - logprobs(want, r.tokens, params.temperature)
        assert difference.abs().max() <= bound
        if params.rollouts == 1:
            start = len(given[r.prompt_index])
            got = torch.stack([found[r.prompt_index, start + i] for i in range(NEW)])
            assert (got - want).abs().max() <= 3 * bound  # the largest of 131 a row; a wrong window is off by 0.1


def rms(parts: list[torch.Tensor]) -> float:
    return torch.cat(parts).square().mean().sqrt().item()


@dataclass
class Found:
    """One token's logprob, from all who compute it, in bf16 but for the last."""

    recorded: list[torch.Tensor] = field(default_factory=list)  # by the rollout
    recomputed: list[torch.Tensor] = field(default_factory=list)  # by the policy, as its first update does
    cached: list[torch.Tensor] = field(default_factory=list)  # by transformers, decoding
    whole: list[torch.Tensor] = field(default_factory=list)  # by transformers, in a full forward
    exact: list[torch.Tensor] = field(default_factory=list)  # by that in fp64

    def apart(self, one: str, other: str) -> float:
        return rms([a - b for a, b in zip(getattr(self, one), getattr(self, other))])


def everyones_logprobs(name: str) -> dict[bool, Found]:
    """By whether the token was the greedy choice: of every way to sample, several prompts of several lengths."""
    given, params = prompts(4 * LENGTHS), [p for p in EACH for _ in range(4)]
    hydra = HydraModel({"base": build(name, torch.bfloat16)}, adapters={"actor": LoraSpec(r=4, alpha=8)})
    rollouts = SlicedGenerator(hydra, "1MiB").generate(given, params)
    sequences = [given[r.prompt_index] + r.tokens for r in rollouts]
    heats = [params[r.prompt_index].temperature or 1.0 for r in rollouts]
    lengths, before = [len(s) for s in sequences], [len(s) - NEW for s in sequences]
    flat, options = (
        torch.tensor([t for s in sequences for t in s]),
        {"prompt_lengths": before, "temperature": torch.tensor(heats)},
    )
    scores = hydra.score(flat, lengths, roles=("actor",), **options)["actor"].logprob.double().split(NEW)
    lm = build(name, torch.bfloat16)
    if name != "gemma2":  # its softcap needs the eager attention, whose two ways are bit-equal at this size
        lm.set_attn_implementation("sdpa")
    double = copy.deepcopy(lm).double()
    found = {True: Found(), False: Found()}
    for r, score, heat in zip(rollouts, scores, heats):
        prompt, of = given[r.prompt_index], found[r.greedy]
        of.recorded.append(torch.tensor(r.logprobs).double())
        of.recomputed.append(score)
        of.cached.append(logprobs(cached(lm, prompt, r.tokens), r.tokens, heat))
        of.whole.append(logprobs(full(lm, prompt, r.tokens), r.tokens, heat))
        of.exact.append(logprobs(full(double, prompt, r.tokens), r.tokens, heat))
    return found


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n != "llama")])
@torch.no_grad()
def test_bf16_logprobs_are_recomputed_more_closely_than_transformers_recomputes_its_own(name):
    """The policy's own recomputation, as the first update does it, against cached decode and full forward there.

    Against transformers' full forward, which no update computes, no implementation of its own can hold that: exact
    arithmetic is further from it than its own decode is. There the rollout is as near as two that err by themselves.
    """
    for of in everyones_logprobs(name).values():
        error = of.apart("whole", "exact")
        theirs = error if name == "gemma2" else of.apart("cached", "whole")
        assert of.apart("recorded", "recomputed") <= theirs <= 1.2 * error
        assert of.apart("recorded", "whole") <= math.hypot(of.apart("recorded", "exact"), error)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bf16_logprobs_are_as_near_to_the_truth_as_transformers_own_decode(name):
    lm, given = model(name).bfloat16(), prompts(LENGTHS)
    double = copy.deepcopy(lm).double()
    ours, theirs = [], []
    for r in generator(lm, 60).generate(given, EACH):
        prompt, temperature = given[r.prompt_index], EACH[r.prompt_index].temperature
        want = logprobs(full(double, prompt, r.tokens), r.tokens, temperature)
        ours.append(torch.tensor(r.logprobs).double() - want)
        theirs.append(logprobs(cached(lm, prompt, r.tokens), r.tokens, temperature) - want)
    assert rms(ours) <= 1.15 * rms(theirs)
