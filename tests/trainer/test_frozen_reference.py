"""Dynamic LoRA's promise: with the adapters off the model is the one it started from, to the bit, however long its
adapters were trained. It is held against copies loaded apart from it that never trained, in the same packed shape.
"""

import pytest
import tiny
import torch

from rlhf_kernels.nn import HydraModel, Role
from rlhf_kernels.nn.forward import checked_batch, hidden_states
from rlhf_kernels.nn.lora import match_layers
from rlhf_kernels.nn.packing import ROW_ALIGN
from rlhf_trainer import core
from rlhf_trainer.algorithms import find, with_defaults
from rlhf_trainer.models import build, load_tokenizer

UPDATES = 50
ROLLOUTS = 2  # of 10 completions, 5 epochs in 5 minibatches each
LENGTHS, PROMPTS = [7, 2, 31, 16, 9, 40], [3, 1, 20, 13, 8, 2]
QUICK = [("hydra-ppo", "float32"), ("hydra-ppo", "bfloat16"), ("lora-ppo", "float32"), ("pe-rlhf", "float32")]
LAYOUTS = [
    pytest.param(algorithm, dtype, marks=[] if (algorithm, dtype) in QUICK else pytest.mark.slow)
    for algorithm in ("hydra-ppo", "j-hydra-ppo", "lora-ppo", "remax", "ppo-max", "pe-rlhf")
    for dtype in ("float32", "bfloat16")
]


def trained(directory, algorithm, dtype):
    """A phase about to step and its policy; `remax` and `ppo-max` with adapters."""
    settings = {"num_ppo_epochs": 5, "num_mini_batches": 5, "rollout_batch_size": 10, "learning_rate": 1e-2}
    settings |= {"lora_r": 4, "lora_alpha": 8.0, "dtype": dtype}
    config = tiny.config(directory, algorithm, **settings, critic_warmup_steps=0)
    config = with_defaults(config.validate())
    return (*core.build_phase(config, find(algorithm), load_tokenizer(config)), config)


def batch():
    tokens = torch.randint(2, len(tiny.WORDS) + 3, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    return tokens, torch.tensor(LENGTHS), torch.tensor(PROMPTS)


@torch.no_grad()
def off(model, roles):
    """What the adapter-off rows say in one call with the others: final hidden states, logits, logprobs, rewards."""
    tokens, lengths, prompts = batch()
    found = hidden_states(model, checked_batch(tokens, lengths, prompts, model.device), dict.fromkeys(roles))
    out = model.score(tokens, lengths, roles=roles, prompt_lengths=prompts, entropy=True, temperature=0.7)
    hidden = found["reference"][1]
    return {
        "hidden": hidden,
        "logits": model.head("reference")(hidden),
        "logprob": out["reference"].logprob,
        "entropy": out["reference"].entropy,
        "reward": out["reward"].reward,
    }


@torch.no_grad()
def plain(path, dtype, parts, like):
    """The same from a checkpoint without adapters: its rows lie where the bypass lies behind `parts` adapters' rows."""
    roles = {"reference": Role(None, "lm"), "reward": Role(None, "reward")}
    model = HydraModel.from_pretrained(path, roles=roles, dtype=dtype)
    match_layers(model.decoder("base"), like)  # the same kernels, nothing on them
    tokens, lengths, _ = batch()
    filler = -len(tokens) % ROW_ALIGN
    assert filler
    part = torch.cat([tokens, tokens.new_zeros(filler)])
    sizes = [*LENGTHS, filler] * (parts + 1)
    rows = checked_batch(part.repeat(parts + 1), sizes, None, model.device)
    hidden = hidden_states(model, rows, {"reference": None})["reference"][1][len(part) * parts :][: len(tokens)]
    last = hidden[lengths.cumsum(0) - 1].float()
    return {
        "hidden": hidden,
        "logits": model.head("reference")(hidden),
        "reward": model.head("reward")(last).squeeze(-1),
    }


def assert_bits(got, expected, when):
    for name, value in expected.items():
        assert torch.equal(got[name], value), (when, name, (got[name] - value).abs().max())


@pytest.mark.parametrize(("algorithm", "dtype"), LAYOUTS)
def test_adapters_off_is_the_frozen_model_to_the_bit_before_and_after_fifty_updates(tmp_path, algorithm, dtype):
    phase, policy, config = trained(tmp_path, algorithm, dtype)
    model, roles = policy.model, tuple(r for r in policy.layout.roles if r != "critic_start")
    apart = build(config, find(algorithm)).model  # another load of the same files, its adapters as they were drawn
    before = off(model, roles)
    assert_bits(before, off(apart, roles), "before")
    for step in range(ROLLOUTS):
        metrics = phase.step(step)
        assert step > 0 or metrics["objective/kl"] == 0.0
    assert phase.optimizer.updates == UPDATES
    assert_bits(off(model, roles), off(apart, roles), "after")
    assert metrics["objective/kl"] != 0.0
    if algorithm != "lora-ppo":  # there the reference and the reward model are whole copies
        parts = len(policy.layout.adapters)
        without = plain(config.model, getattr(torch, dtype), parts, model.decoder("base"))
        if algorithm == "pe-rlhf":
            without.pop("reward")  # an adapter there
        assert_bits(off(model, roles), without, "without adapters")
