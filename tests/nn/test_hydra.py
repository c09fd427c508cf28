"""HydraModel: what each role computes, that roles in one pass are roles apart, and what is trained."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from architectures import CONFIGS, EXTRA, build
from torch import nn

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.integrations.transformers import PackedRows
from rlhf_kernels.nn import HydraModel, LoraSpec, Role
from rlhf_kernels.nn.forward import checked_batch, hidden_states
from rlhf_kernels.nn.lora import lora_layers

LENGTHS = [9, 5, 1, 17]
PROMPTS = [4, 1, 1, 16]


def hydra(name="llama", trained=True, seed=0, dtype=torch.float32, **options):
    """A model whose adapters do something (B is random), unless `trained` is False."""
    torch.manual_seed(seed)
    options.setdefault("adapters", {"actor": LoraSpec(r=4, alpha=8), "critic": LoraSpec(r=3, alpha=3)})
    model = HydraModel({"base": build(name, dtype)}, **options)
    if trained:
        for name in model.adapters:
            randomise(model, name)
    return model


def randomise(model, adapter):
    for layer in lora_layers(model).values():
        if adapter in layer.lora_B:
            nn.init.normal_(layer.lora_B[adapter], std=0.1)


def tokens(lengths=LENGTHS, seed=0):
    return torch.randint(0, 131, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def expected_logprobs(model, flat, lengths, prompts):
    """Each sequence alone through transformers' own model, logits and all."""
    found = []
    for ids, prompt in zip(flat.split(lengths), prompts):
        logprobs = model(ids[None]).logits[0].float().log_softmax(-1)
        found.append(logprobs[:-1].gather(-1, ids[1:, None])[prompt - 1 :, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", [*CONFIGS, *EXTRA])
@torch.no_grad()
def test_bypassed_logprobs_are_those_of_transformers_own_model(name):
    """Final softcaps, logit scales, windows, positions, Conv1D, a head without a bias: whatever the model does."""
    out = hydra(name).score(tokens(), LENGTHS, roles=("actor", "reference"), prompt_lengths=PROMPTS)
    want = expected_logprobs(build(name), tokens(), LENGTHS, PROMPTS)
    torch.testing.assert_close(out["reference"].logprob, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out["actor"].logprob, want, atol=1e-2)
    assert out.lengths.tolist() == [5, 4, 0, 1]


@torch.no_grad()
def test_values_lie_before_their_token_and_rewards_at_the_end():
    model = hydra()
    out = model.score(tokens(), LENGTHS, roles=("critic", "reward"), prompt_lengths=PROMPTS)
    plain, values, rewards = build("llama"), [], []
    for ids in tokens().split(LENGTHS):
        rewards.append(model.heads["reward"](plain.model(ids[None]).last_hidden_state[0, -1]))
    torch.testing.assert_close(out["reward"].reward, torch.cat(rewards), rtol=1e-5, atol=1e-5)
    assert out["critic"].logprob is None
    model.roles["critic value off"] = Role(None, "value")
    bypassed = model.score(tokens(), LENGTHS, roles=("critic value off",), prompt_lengths=PROMPTS)
    for ids, prompt in zip(tokens().split(LENGTHS), PROMPTS):
        hidden = plain.model(ids[None]).last_hidden_state[0]
        values.append(model.heads["value"](hidden[prompt - 1 : -1])[:, 0])
    torch.testing.assert_close(bypassed["critic value off"].value, torch.cat(values), rtol=1e-5, atol=1e-5)
    assert out["critic"].value.shape == torch.cat(values).shape


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_roles_in_one_pass_equal_roles_apart(name):
    model = hydra(name)
    names = ("critic", "reference", "actor", "reward")
    together = model.score(tokens(), LENGTHS, roles=names, prompt_lengths=PROMPTS, entropy=True)
    assert tuple(together) == names
    for role in names:
        alone = model.score(tokens(), LENGTHS, roles=(role,), prompt_lengths=PROMPTS, entropy=True)
        for field in ("logprob", "entropy", "value", "reward"):
            got, want = getattr(together[role], field), getattr(alone[role], field)
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_the_kl_of_an_untrained_actor_is_exactly_zero(name, dtype, threads):
    """At step 0 B = 0; equal rows at different places of one pass must get the same bits, at odd lengths too."""
    model = hydra(name, trained=False, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in (2, 3, 5, 7, 11, 13, 17, 23, 29, 31, 37, 41, 47, 53, 61):
            flat, lengths = tokens([length, 3, 1]), [length, 3, 1]
            out = model.score(flat, lengths, roles=("actor", "critic", "reference"), divergence=("kl", "k1"))
            assert not out["actor"].kl.any(), length
            assert not out["actor"].k1.any(), length
            assert torch.equal(out["actor"].logprob, out["reference"].logprob)
    finally:
        torch.set_num_threads(before)


ROLES = ("reference", "reward", "critic", "actor")
FIELDS = ("logprob", "value", "reward")


def apart(model, flat, lengths, prompts, names):
    """The sequences scored by one call a role."""
    found = {}
    for role in ROLES:
        mine = [i for i, name in enumerate(names) if name == role]
        pieces = flat.split(lengths)
        found[role] = model.score(
            torch.cat([pieces[i] for i in mine]), [lengths[i] for i in mine], roles=(role,),
            prompt_lengths=[prompts[i] for i in mine],
        )[role]  # fmt: skip
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
@torch.no_grad()
def test_rows_of_four_roles_in_one_call_score_as_four_calls(name, dtype):
    """Lengths from 2 to 40; in bf16 one call errs no more against float64 than four calls do."""
    model = hydra(name, dtype=dtype)
    lengths, prompts = [7, 2, 40, 13, 5, 31, 16, 9], [3, 1, 20, 13, 1, 30, 8, 2]
    names, flat = list(ROLES) * 2, tokens([7, 2, 40, 13, 5, 31, 16, 9])
    together = model.score(flat, lengths, prompt_lengths=prompts, row_roles=names)
    separate = apart(model, flat, lengths, prompts, names)
    exact = apart(copy.deepcopy(model).double(), flat, lengths, prompts, names) if dtype == torch.bfloat16 else separate
    for role in ROLES:
        for field in FIELDS:
            got, want, truth = (getattr(o[role], field) for o in (together, separate, exact))
            assert (got is None) == (want is None)
            if want is None:
                continue
            if dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert (got - truth).norm() <= 2 * (want - truth).norm() + 1e-6 * truth.norm(), (role, field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bases", ["shared", "separate"])
@torch.no_grad()
def test_hidden_states_of_an_untrained_actor_are_the_references_bit_for_bit(dtype, threads, bases):
    """At step 0 the actor is the reference, wherever its rows lie and whatever computes the layers."""
    model, roles = hydra("qwen2", trained=False, dtype=dtype), ("actor", "critic", "reference")
    if bases == "separate":
        roles = ("actor", "reference")
        model = HydraModel({n: build("qwen2", dtype) for n in ("actor", "reference")}, {"actor": LoraSpec(r=4)})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in (1, 2, 7, 16, 29, 61):
            batch = checked_batch(tokens([length, 3, 1]), [length, 3, 1], None, model.device)
            found = hidden_states(model, batch, dict.fromkeys(roles))
            assert torch.equal(found["actor"][1], found["reference"][1]), length
    finally:
        torch.set_num_threads(before)


def test_the_same_holds_without_the_cpus_own_kernels():
    """The unit is chosen once a process, so this needs another."""
    environment = {**os.environ, "RLHF_KERNELS_CPU_ISA": "portable"}
    chosen = "are_the_references_bit or (exactly_zero and llama)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]


@torch.no_grad()
def test_rewards_of_the_bypass_are_bit_equal_to_a_frozen_copy_in_the_same_packed_shape():
    trained, frozen = hydra(), hydra(trained=False)
    frozen.copy_head("value", "value")
    for head in frozen.heads:
        frozen.heads[head].weight.copy_(trained.heads[head].weight)
    roles = ("actor", "critic", "reference", "reward")
    got, want = (m.score(tokens(), LENGTHS, roles=roles) for m in (trained, frozen))
    assert torch.equal(got["reward"].reward, want["reward"].reward)
    assert torch.equal(got["reference"].logprob, want["reference"].logprob)


@torch.no_grad()
def test_a_poisoned_adapter_leaves_the_other_roles_alone():
    model = hydra()
    roles = ("actor", "critic", "reference", "reward")
    want = model.score(tokens(), LENGTHS, roles=roles)
    for parameter in model.trainable_parameters("critic")[:-1]:
        parameter.fill_(float("nan"))
    got = model.score(tokens(), LENGTHS, roles=roles)
    assert got["critic"].value.isnan().all()
    assert torch.equal(got["actor"].logprob, want["actor"].logprob)
    assert torch.equal(got["reference"].logprob, want["reference"].logprob)
    assert torch.equal(got["reward"].reward, want["reward"].reward)


@torch.no_grad()
def test_divergence_compares_with_the_reference_rows_of_the_call():
    model = hydra()
    out = model.score(tokens(), LENGTHS, roles=("actor", "reference"), divergence=("kl", "k1"), entropy=True)
    torch.testing.assert_close(out["actor"].k1, out["actor"].logprob - out["reference"].logprob, rtol=1e-4, atol=1e-5)
    assert (out["actor"].kl > 0).all()
    assert out["reference"].entropy is not None
    with pytest.raises(ValueError, match="reference"):
        model.score(tokens(), LENGTHS, roles=("actor",), divergence=("kl",))


@pytest.mark.parametrize("grad", [("logprob",), ("logprob", "entropy")], ids=["logprob", "logprob and entropy"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gradients_of_roles_in_one_pass_are_those_of_roles_apart(name, grad):
    model = hydra(name)

    def loss(out, role):
        result = out[role]
        if role == "critic":
            return (result.value**2).sum()
        return (result.logprob * torch.arange(len(result.logprob))).sum() + (
            result.entropy.sum() if "entropy" in grad else 0
        )

    options = {"prompt_lengths": PROMPTS, "entropy": "entropy" in grad, "grad_fields": grad}
    parameters = {role: model.trainable_parameters(role) for role in ("actor", "critic")}
    together = model(tokens(), LENGTHS, roles=("actor", "critic", "reference"), **options)
    (loss(together, "actor") + loss(together, "critic")).backward()
    got = {role: [p.grad for p in ps] for role, ps in parameters.items()}
    for role, ps in parameters.items():
        model.zero_grad()
        loss(model(tokens(), LENGTHS, roles=(role,), **options), role).backward()
        for mine, p in zip(got[role], ps):
            torch.testing.assert_close(mine, p.grad, rtol=2e-4, atol=2e-4)
        assert any(p.grad.any() for p in ps)
        other = "critic" if role == "actor" else "actor"
        assert all(p.grad is None for p in parameters[other][:-1])
    assert all(p.grad is None for p in model.bases["base"].get_output_embeddings().parameters())


def test_gradients_equal_those_of_transformers_model_with_the_deltas_in_its_weights():
    model, plain = hydra("llama"), build("llama")
    with torch.no_grad():
        for path, layer in {p: m for p, m in model.bases["base"].named_modules() if hasattr(m, "lora_A")}.items():
            plain.get_submodule(path).weight += 2.0 * layer.lora_B["actor"] @ layer.lora_A["actor"]
    out = model(tokens(), LENGTHS, roles=("actor",))
    want = expected_logprobs(plain, tokens(), LENGTHS, [1] * 4)
    torch.testing.assert_close(out["actor"].logprob, want, rtol=1e-4, atol=1e-4)
    out["actor"].logprob.sum().backward()
    want.sum().backward()
    layer = model.bases["base"].model.layers[0].self_attn.v_proj
    dw = plain.model.layers[0].self_attn.v_proj.weight.grad
    torch.testing.assert_close(layer.lora_A["actor"].grad, 2.0 * layer.lora_B["actor"].T @ dw, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.lora_B["actor"].grad, 2.0 * dw @ layer.lora_A["actor"].T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointed_gradients_are_equal_after_another_role_ran(name, use_reentrant):
    model = hydra(name)

    def gradients():
        model.zero_grad()
        first = model(tokens(), LENGTHS, roles=("actor",))
        model(tokens(), LENGTHS, roles=("critic", "reference"))
        first["actor"].logprob.sum().backward()
        assert all(p.grad is None for p in model.trainable_parameters("critic"))
        return [p.grad for p in model.trainable_parameters("actor")]

    want = gradients()
    model.gradient_checkpointing_enable(use_reentrant=use_reentrant)
    for got, reference in zip(gradients(), want):
        assert torch.equal(got, reference)


@torch.no_grad()
def test_row_roles_send_each_sequence_through_its_own_role():
    model = hydra()
    names = ["actor", "critic", "reference", "actor"]
    mixed = model.score(
        tokens(), LENGTHS, prompt_lengths=PROMPTS, row_roles=names, temperature=torch.tensor([1, 2, 3, 4.0])
    )
    pieces = tokens().split(LENGTHS)
    alone = model.score(
        torch.cat([pieces[0], pieces[3]]), [9, 17], roles=("actor",), prompt_lengths=[4, 16],
        temperature=torch.tensor([1, 4.0]),
    )  # fmt: skip
    torch.testing.assert_close(mixed["actor"].logprob, alone["actor"].logprob, rtol=1e-5, atol=1e-5)
    assert mixed["critic"].value.shape == (4,)
    assert mixed["reference"].logprob.shape == (0,)
    with pytest.raises(ValueError, match="row_roles has 1"):
        model.score(tokens(), LENGTHS, row_roles=["actor"])


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_gives_the_models_own_logits_through_the_roles_adapter(name):
    model, flat = hydra(name), tokens()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    ends = cu[1:].long() - 1
    rows = torch.cat([torch.arange(31), ends])
    plain = torch.cat([build(name)(ids[None]).logits[0] for ids in flat.split(LENGTHS)])
    got = model.decode("reference", flat, positions, PackedRows(cu), rows)
    torch.testing.assert_close(got, plain[rows], rtol=1e-5, atol=1e-5)
    logprobs = model.decode("actor", flat, positions, PackedRows(cu), torch.arange(8)).log_softmax(-1)
    scored = model.score(flat, LENGTHS, roles=("actor",))["actor"].logprob[:8]
    torch.testing.assert_close(logprobs.gather(1, flat[1:9, None])[:, 0], scored, rtol=1e-5, atol=1e-5)


def test_the_default_roles_are_hydras_and_a_joint_adapter_serves_actor_and_critic():
    assert hydra().roles == {
        "actor": Role("actor", "lm"),
        "critic": Role("critic", "value"),
        "reference": Role(None, "lm"),
        "reward": Role(None, "reward"),
    }
    joint = hydra(adapters={"joint": LoraSpec(r=2)})
    assert joint.roles["actor"] == Role("joint", "lm")
    assert joint.roles["critic"] == Role("joint", "value")
    out = joint(tokens(), LENGTHS)
    assert out["actor"].logprob.shape == out["critic"].value.shape


def test_trainable_parameters_are_the_adapters_and_the_roles_own_head():
    model = hydra()
    assert len(model.trainable_parameters("actor")) == 2 * 14
    assert len(model.trainable_parameters("critic")) == 2 * 14 + 1
    assert model.trainable_parameters("critic")[-1] is model.heads["value"].weight
    assert model.trainable_parameters("reference") == []
    assert [p is model.heads["reward"].weight for p in model.trainable_parameters("reward")] == [True]
    frozen = [p for n, p in model.named_parameters() if "lora_" not in n and not n.startswith("heads")]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("train_base", [True, ["critic"]], ids=["all", "named"])
def test_separate_bases_train_where_they_are_told_to(train_base):
    bases = {name: build("llama") for name in ("actor", "critic", "reference", "reward")}
    model = HydraModel(bases, train_base=train_base)
    assert model.roles["critic"] == Role(None, "value", "critic")
    assert set(model.heads) == {"critic:value", "reward:reward"}
    trained = set(bases) if train_base is True else {"critic"}
    for name, base in model.bases.items():
        assert all(p.requires_grad == (name in trained) for p in base.parameters())
    assert len(model.trainable_parameters("critic")) == len(list(bases["critic"].parameters())) + 1
    out = model(tokens(), LENGTHS, roles=("actor", "critic", "reference"), divergence=("k1",))
    torch.testing.assert_close(out["actor"].k1, torch.zeros(28))
    (out["actor"].logprob.sum() + out["critic"].value.sum()).backward()
    assert bases["critic"].model.layers[0].mlp.up_proj.weight.grad.any()
    assert (bases["actor"].lm_head.weight.grad is not None) == (train_base is True)


def test_a_trainable_base_gets_the_gradients_of_a_plain_model():
    model, plain = hydra(adapters={}, train_base=True), build("llama")
    model(tokens(), LENGTHS, roles=("actor",))["actor"].logprob.sum().backward()
    expected_logprobs(plain, tokens(), LENGTHS, [1] * 4).sum().backward()
    for (name, got), want in zip(model.bases["base"].named_parameters(), plain.parameters()):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_copying_an_adapter_and_a_head():
    model = hydra(adapters={"actor": LoraSpec(r=4), "critic": LoraSpec(r=4), "other": LoraSpec(r=2)})
    model.copy_adapter("actor", "critic")
    model.copy_head("reward", "critic")
    assert torch.equal(model.heads["reward"].weight, model.heads["value"].weight)
    pairs = zip(model.trainable_parameters("actor"), model.trainable_parameters("critic"))
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    model.roles["snapshot"] = Role("snapshot")
    model.add_adapter("snapshot", LoraSpec(r=4))
    model.copy_adapter("actor", "snapshot")
    out = model.score(tokens(), LENGTHS, roles=("actor", "snapshot"))
    assert torch.equal(out["actor"].logprob, out["snapshot"].logprob)
    with pytest.raises(ValueError, match="'actor' and 'other' differ"):
        model.copy_adapter("actor", "other")
    model.delete_adapter("critic")
    alone = model.score(tokens(), LENGTHS, roles=("actor",))["actor"].logprob
    torch.testing.assert_close(alone, out["actor"].logprob, rtol=1e-5, atol=1e-5)  # other bits at another size
    with pytest.raises(ValueError, match="role 'critic' uses adapter 'critic'"):
        model.score(tokens(), LENGTHS, roles=("critic",))


def test_dropout_stays_off_in_training_mode():
    model = hydra("gpt2").train()
    assert model.training
    roles = ("actor", "reference")
    first, second = (model(tokens(), LENGTHS, roles=roles)["actor"].logprob for _ in range(2))
    assert torch.equal(first, second)


BAD = {
    "a token outside the vocabulary": ({"tokens": torch.full((32,), 131)}, IndexError, "tokens holds 131"),
    "tokens of truth": ({"tokens": torch.ones(32, dtype=torch.bool)}, TypeError, "tokens must be"),
    "fractional lengths": ({"lengths": torch.tensor([32.0])}, TypeError, "lengths must be ints"),
    "too few temperatures": ({"temperature": torch.ones(3)}, ValueError, "temperature has shape"),
    "a gradient nobody asked for": ({"grad_fields": ("kl",)}, ValueError, "grad_fields is"),
    "unknown role": ({"roles": ("nobody",)}, ValueError, "role 'nobody'"),
    "a role as a string": ({"roles": "actor"}, TypeError, "roles is 'actor'"),
    "lengths that do not add up": ({"lengths": [9, 5]}, ValueError, "lengths sum to 14"),
    "an empty sequence": ({"lengths": [32, 0]}, ValueError, "least 0"),
    "a prompt longer than its sequence": ({"prompt_lengths": [10, 1, 1, 1]}, ValueError, "prompt_lengths must lie"),
    "too few prompt lengths": ({"prompt_lengths": [1]}, ValueError, "prompt_lengths is"),
    "padded tokens": ({"tokens": torch.zeros(2, 16, dtype=torch.long)}, TypeError, "tokens must be"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(change, error, message):
    good = {"tokens": tokens(), "lengths": LENGTHS}
    with pytest.raises(error, match=message):
        hydra()(**(good | change))


def test_one_model_under_two_names_is_an_error():
    base = build("llama")
    with pytest.raises(ValueError, match="bases holds one model under two names"):
        HydraModel({"base": base, "critic": base})


def test_autocast_runs_in_training_scoring_and_generation():
    model = hydra()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(), LENGTHS, roles=("actor", "critic", "reference"), divergence=("kl",))
        (rollout,) = SlicedGenerator(model, "1MiB").generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
    exact = model.score(tokens(), LENGTHS, roles=("actor",))
    assert out["actor"].logprob.dtype == out["critic"].value.dtype == torch.float32
    torch.testing.assert_close(out["actor"].logprob, exact["actor"].logprob, rtol=0.1, atol=0.3)
    (out["actor"].logprob.sum() + out["critic"].value.sum()).backward()
    assert len(rollout.tokens) == 4


WRONG = {
    "a role with an unknown adapter": ({"roles": {"actor": Role("nobody")}}, "names adapter 'nobody'"),
    "a role with an unknown base": ({"roles": {"actor": Role(base="moon")}}, "names base 'moon'"),
    "an unknown base to train": ({"train_base": ["moon"]}, "train_base names 'moon'"),
    "an adapter with a dot": ({"adapters": {"a.b": LoraSpec()}}, "'a.b' is no name"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_model_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        hydra(**options)


def test_models_built_from_one_config_keep_their_own_attention():
    first = build("llama")
    second = type(first)(first.config)
    HydraModel({"base": first})
    assert first.config._attn_implementation != second.config._attn_implementation
    assert second(torch.arange(5)[None]).logits.shape == (1, 5, 131)
    assert copy.deepcopy(first.config)._attn_implementation == "rlhf_kernels_packed"


def test_frozen_bases_compute_the_layers_that_another_ones_adapters_are_on_as_it_does():
    bases = {name: build("llama") for name in ("actor", "reference", "critic")}
    spec = LoraSpec(r=2, target_modules=("q_proj", "v_proj"))
    model = HydraModel(bases, {"actor": spec}, train_base=["critic"], fuse=False)
    layers = {name: lora_layers(base) for name, base in model.bases.items()}
    assert list(layers["reference"]) == list(layers["actor"])
    assert len(layers["actor"]) == 4
    assert not layers["critic"]
    assert all(layer.siblings == [layer] for layer in layers["actor"].values())
    assert set(bases["reference"].state_dict()) == set(build("llama").state_dict())
