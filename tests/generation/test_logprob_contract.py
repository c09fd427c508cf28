"""What a rollout records is what training recomputes: the logprob at the temperature over the whole vocabulary.

In fp32 to max(1e-5, 4e-6 standard deviations of the logits). In bf16 the measure is transformers itself: how far its
own cached decode is from its own full forward on the same tokens, and how far both are from the same model in fp64.
"""

import copy

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


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n != "llama")])
@torch.no_grad()
def test_bf16_logprobs_are_recomputed_more_closely_than_transformers_recomputes_its_own(name):
    """The policy's own recomputation, as the first update does it, against cached decode and full forward there."""
    given = prompts(LENGTHS)
    hydra = HydraModel({"base": build(name, torch.bfloat16)}, adapters={"actor": LoraSpec(r=4, alpha=8)})
    params = SamplingParams(NEW, temperature=0.7)
    rollouts = SlicedGenerator(hydra, "1MiB").generate(given, params)
    flat = torch.tensor([t for p, r in zip(given, rollouts) for t in p + r.tokens])
    counts = [len(p) + NEW for p in given], [len(p) for p in given]
    score = hydra.score(flat, counts[0], roles=("actor",), prompt_lengths=counts[1], temperature=0.7)["actor"].logprob
    ours = torch.tensor([x for r in rollouts for x in r.logprobs]) - score
    theirs, exact = [], []
    lm = build(name, torch.bfloat16)
    if name != "gemma2":  # its softcap needs the eager attention, whose two ways are bit-equal at this size
        lm.set_attn_implementation("sdpa")
    double = copy.deepcopy(lm).double()
    for prompt, r in zip(given, rollouts):
        whole = logprobs(full(lm, prompt, r.tokens), r.tokens, 0.7)
        theirs.append(logprobs(cached(lm, prompt, r.tokens), r.tokens, 0.7) - whole)
        exact.append(whole - logprobs(full(double, prompt, r.tokens), r.tokens, 0.7))
    assert rms([ours]) <= rms(exact if name == "gemma2" else theirs)


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
