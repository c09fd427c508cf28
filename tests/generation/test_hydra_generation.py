"""A HydraModel generates through the named role's adapter, without merging it."""

import pytest
import torch
from architectures import CONFIGS, build
from torch import nn

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_kernels.nn.lora import lora_layers

GIVEN = [[5, 9, 11, 3, 77], [8], [100, 4, 4, 60, 61, 62, 63, 9, 1]]


def hydra(name="llama"):
    torch.manual_seed(0)
    adapters = {"actor": LoraSpec(r=4, alpha=8), "critic": LoraSpec(r=3, alpha=3)}
    model = HydraModel({"base": build(name)}, adapters=adapters)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["actor"], std=0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_rollout_logprobs_are_what_the_roles_score(name):
    model = hydra(name)
    gen = SlicedGenerator(model, "1MiB", slice_tokens=4)
    for role in ("actor", "reference"):
        rollouts = gen.generate(GIVEN, SamplingParams(max_new_tokens=9), role=role)
        flat = torch.tensor([t for prompt, r in zip(GIVEN, rollouts) for t in prompt + r.tokens])
        lengths = [len(prompt) + len(r.tokens) for prompt, r in zip(GIVEN, rollouts)]
        out = model.score(flat, lengths, roles=(role,), prompt_lengths=[len(p) for p in GIVEN])
        got = torch.tensor([p for r in rollouts for p in r.logprobs])
        torch.testing.assert_close(got, out[role].logprob, rtol=0, atol=2e-5)


def test_roles_differ_by_their_adapter_and_the_bypassed_one_is_the_base():
    gen = SlicedGenerator(hydra(), "1MiB")
    greedy = SamplingParams(max_new_tokens=9, temperature=0)
    actor, reference = (gen.generate(GIVEN, greedy, role=role) for role in ("actor", "reference"))
    assert [r.tokens for r in actor] != [r.tokens for r in reference]
    base = SlicedGenerator(build("llama"), "1MiB").generate(GIVEN, greedy)
    assert [r.tokens for r in base] == [r.tokens for r in reference]


def test_generating_leaves_training_as_it_was():
    model = hydra().train()
    SlicedGenerator(model, "1MiB").generate(GIVEN, SamplingParams(max_new_tokens=3))
    assert model.training
    flat = torch.tensor([t for prompt in GIVEN for t in prompt])
    out = model(flat, [len(p) for p in GIVEN], roles=("actor",))
    out["actor"].logprob.sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters("actor"))
