"""A HydraModel generates through the named role's adapter, without merging it."""

from weakref import WeakSet

import pytest
import torch
from architectures import CONFIGS, build
from torch import nn

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.nn import HydraModel, LoraSpec, Role
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


def test_a_role_generates_as_its_adapter_merged_into_the_base():
    """Two adapters side by side, each applied by its index and not by the other's."""
    model = hydra()
    model.roles["critic's actor"] = Role(adapter="critic", head="lm")
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["critic"], std=0.1)
    gen, found = SlicedGenerator(model, "1MiB"), {}
    params = SamplingParams(max_new_tokens=9, greedy_baseline=True)
    for role, adapter, scaling in (("actor", "actor", 2.0), ("critic's actor", "critic", 1.0), ("actor", "actor", 2.0)):
        merged = build("llama")
        for path, layer in lora_layers(model.decoder("base")).items():
            delta = layer.lora_B[adapter] @ layer.lora_A[adapter] * scaling
            merged.get_submodule(path).weight.data += delta.detach()
        found[role] = gen.generate(GIVEN, params, role=role)
        want = SlicedGenerator(merged, "1MiB").generate(GIVEN, params)
        assert [r.tokens for r in found[role]] == [r.tokens for r in want]
    assert found["actor"] != found["critic's actor"]


def test_a_trained_adapter_is_used_at_once_and_the_reference_stays():
    model = hydra()
    gen, greedy = SlicedGenerator(model, "1MiB"), SamplingParams(max_new_tokens=9, temperature=0)
    before = {role: gen.generate(GIVEN, greedy, role=role) for role in ("actor", "reference")}
    flat, lengths = torch.tensor([t for prompt in GIVEN for t in prompt]), [len(p) for p in GIVEN]
    optimizer = torch.optim.SGD(model.trainable_parameters("actor"), lr=3.0)
    model(flat, lengths, roles=("actor",))["actor"].logprob.sum().neg().backward()
    optimizer.step()
    assert [r.tokens for r in gen.generate(GIVEN, greedy)] != [r.tokens for r in before["actor"]]
    assert gen.generate(GIVEN, greedy, role="reference") == before["reference"]


def test_roles_on_bases_of_different_shapes_share_the_budget(monkeypatch):
    """Streams that were opened for both hold one arena at a time."""
    roles = {"actor": Role(), "other": Role(base="other")}
    model = HydraModel({"base": build("llama"), "other": build("qwen3")}, roles=roles)
    params = SamplingParams(max_new_tokens=4, temperature=0)
    want = [SlicedGenerator(build(name), "1MiB").generate(GIVEN, params) for name in ("llama", "qwen3")]
    arenas: WeakSet[Arena] = WeakSet()
    acquire = Arena.acquire
    monkeypatch.setattr(Arena, "acquire", lambda arena: (arenas.add(arena), acquire(arena))[1])
    gen = SlicedGenerator(model, 1 << 20)
    gen.generate(GIVEN, params)
    one, two = (gen.stream(GIVEN, params, role=role) for role in roles)
    for stream, expected in ((two, want[1]), (one, want[0])):
        rollouts = sorted(stream, key=lambda r: r.prompt_index)
        assert [r.tokens for r in rollouts] == [r.tokens for r in expected]
        assert sum(arena.nbytes for arena in arenas if arena.held) <= gen.kv_memory
    gen.sleep()
    assert not any(arena.held for arena in arenas)


def test_generating_leaves_training_as_it_was():
    model = hydra().train()
    SlicedGenerator(model, "1MiB").generate(GIVEN, SamplingParams(max_new_tokens=3))
    assert model.training
    flat = torch.tensor([t for prompt in GIVEN for t in prompt])
    out = model(flat, [len(p) for p in GIVEN], roles=("actor",))
    out["actor"].logprob.sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters("actor"))
