"""PE-RLHF: a reward model that is an adapter, a policy that is another, one base, one packed call."""

from types import SimpleNamespace

import pytest
import reference_algorithms as reference
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_algorithms import Run, assert_same

from rlhf_kernels.nn import HydraModel, LoraSpec, Role
from rlhf_trainer import TrainConfig, train
from rlhf_trainer.algorithms import Counts, find, pe_rlhf
from rlhf_trainer.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny.checkpoint(directory / "model", reward_head=False)
    return directory


def test_three_tokens_by_hand():
    """Rewards -0.1, 0.2, 0.7 under gamma 1/2 return 0.175, 0.55, 0.7; values 0.5, 0, 0.2 leave A -0.325, 0.55, 0.5."""
    rollout = SimpleNamespace(
        rewards=torch.tensor([-0.1, 0.2, 0.7, -1.0]),
        values=torch.tensor([0.5, 0.0, 0.2, 0.4]),
        completion_lengths=torch.tensor([3, 1]),
    )
    pe_rlhf.advantages(rollout, TrainConfig(gamma=0.5, lam=0.3), {})
    torch.testing.assert_close(rollout.returns, torch.tensor([0.175, 0.55, 0.7, -1.0]))
    torch.testing.assert_close(rollout.advantages, torch.tensor([-0.325, 0.55, 0.5, -1.4]))


@pytest.mark.parametrize(("mean", "count"), [("sequence", 2), ("token-mean", 4)])
def test_the_loss_by_hand(mean, count):
    """-(2 * -0.5 + -1 * -0.25 + 0 + 3 * -1) = 3.75 over sequences or tokens; errors 1, 0, 2, 0 give 5/2 over 4."""
    out = {
        "actor": SimpleNamespace(logprob=torch.tensor([-0.5, -0.25, -9.0, -1.0])),
        "critic": SimpleNamespace(value=torch.tensor([1.0, 2.0, 3.0, 4.0])),
    }
    batch = SimpleNamespace(
        tokens=None,
        lengths=None,
        prompt_lengths=None,
        advantages=torch.tensor([2.0, -1.0, 0.0, 3.0]),
        returns=torch.tensor([0.0, 2.0, 5.0, 4.0]),
    )
    config = TrainConfig(loss=mean, vf_coef=0.2)
    share = pe_rlhf.loss(lambda *_, **__: out, batch, Counts(4.0, 2.0), config)
    assert share.metrics["loss/policy_avg"].item() == pytest.approx(3.75 / count)
    assert share.value.item() == pytest.approx(3.75 / count + 0.2 * 5 / 2 / 4)


@pytest.mark.parametrize("settings", [{}, {"loss": "token-mean", "gamma": 0.9, "missing_eos_penalty": 0.5}], ids=str)
def test_an_update_equals_the_reference(files, tmp_path, settings):
    rates = {"kl_coef": 0.3, "temperature": 0.7, "critic_learning_rate": 3e-3, "max_grad_norm": 0.3, "vf_coef": 0.5}
    run = Run(files, "pe-rlhf", output_dir=str(tmp_path / "out"), **(rates | settings))
    before = run.nets(tmp_path / "before")
    metrics = run.phase.step(0)
    policy, value = reference.pe_rlhf(before, run.sequences(), run.rollout.finished, run.config)
    assert metrics["loss/policy_avg"] == pytest.approx(policy, abs=1e-5, rel=1e-5)
    assert metrics["loss/value_avg"] == pytest.approx(value, abs=1e-5, rel=1e-5)
    after = run.nets(tmp_path / "after")
    before["critic"].adapter = before["actor"].adapter
    assert_same(after, before)


def test_rewards_are_the_reward_runs_own_and_stay_so_to_the_bit(files, tmp_path):
    run = Run(files, "pe-rlhf", output_dir=str(tmp_path / "out"), learning_rate=1e-2)
    saved = load_file(files / "reward_adapter" / "reward" / "adapter_model.safetensors")
    alone = HydraModel.from_pretrained(
        files / "model", {"reward": LoraSpec(4, 8.0)}, {"reward": Role("reward", "reward")}, dtype=torch.float32
    )
    alone.load_adapters(files / "reward_adapter")
    tokens, lengths, roles = torch.arange(3, 25), torch.tensor([9, 13]), ("actor", "critic", "reference", "reward")
    before = run.policy.model.score(tokens, lengths, roles)
    torch.testing.assert_close(
        before["reward"].reward, alone.score(tokens, lengths, ("reward",))["reward"].reward, atol=1e-5, rtol=1e-5
    )
    for step in range(3):
        run.phase.step(step)
    after = run.policy.model.score(tokens, lengths, roles)
    assert torch.equal(after["reward"].reward, before["reward"].reward)
    assert torch.equal(after["reference"].logprob, before["reference"].logprob)
    assert not torch.equal(after["actor"].logprob, before["actor"].logprob)
    run.policy.model.save_pretrained(str(tmp_path / "now"))
    now = load_file(tmp_path / "now" / "reward" / "adapter_model.safetensors")
    assert all(torch.equal(now[name], value) for name, value in saved.items())


def test_scoring_reads_all_roles_in_one_pass_of_the_base(files, tmp_path):
    run = Run(files, "pe-rlhf", output_dir=str(tmp_path / "out"), per_device_train_batch_size=6)
    decoder, passes = run.policy.model.decoder("base").model, []
    decoder.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    run.phase._update = lambda rollout, step: {}
    score = run.phase.sampler.score

    def counted(*args):
        passes.clear()
        score(*args)
        assert passes == [False]

    run.phase.sampler.score = counted
    run.phase.step(0)


def test_only_the_policys_adapter_and_the_value_head_train(files, tmp_path):
    run = Run(files, "pe-rlhf", moved=False, output_dir=str(tmp_path / "out"))
    assert all(".actor" in name or name == "heads.value.weight" for name in run.policy.trained)
    model = run.policy.model
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".reward" in name)
    assert not model.heads["value"].weight.any()  # the baseline starts at zero
    assert len(model.bases) == 1


def test_a_lora_reward_run_feeds_it_and_only_the_policy_is_its_result(tmp_path):
    out = tmp_path / "reward"
    train(tiny.config(tmp_path, "reward", lora_r=2, lora_alpha=4.0, total_steps=1, output_dir=str(out)))
    result = train(tiny.config(tmp_path, "pe-rlhf", reward_model=str(out), total_steps=1))
    assert result.metrics["reward_std"] > 0
    assert (result.output_dir / "actor" / "adapter_model.safetensors").is_file()
    assert not (result.output_dir / "reward").exists()


def test_a_reward_function_needs_no_reward_adapter(files, tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("pe_rewards")
    module.length = lambda prompts, completions, **_: [float(len(text)) for text in completions]
    monkeypatch.setitem(sys.modules, "pe_rewards", module)
    run = Run(files, "pe-rlhf", output_dir=str(tmp_path / "out"), reward=["pe_rewards:length"])
    assert set(run.policy.model.adapters) == {"actor"}
    assert run.phase.step(0)["reward"] > 0


def refused(config, message):
    with pytest.raises(UserError, match=message) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_a_reward_adapter_of_another_base_is_refused(files, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", seed=7)
    adapter = tiny.reward_adapter(tmp_path / "adapter", other)
    refused(tiny.config(tmp_path, "pe-rlhf", reward_model=adapter), "reward_model: .* was trained on another base than")
    assert not (tmp_path / "out").exists()


def test_a_base_that_was_trained_on_since_is_another(tmp_path):
    model = tiny.checkpoint(tmp_path / "model")
    adapter = tiny.reward_adapter(tmp_path / "adapter", model)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    moved = {name: value + 1e-4 * torch.randn_like(value) for name, value in weights.items()}
    save_file(moved, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    refused(tiny.config(tmp_path, "pe-rlhf", reward_model=adapter), "was trained on another base")


def test_a_base_in_another_dtype_is_the_same(files, tmp_path):
    config = tiny.config(files, "pe-rlhf", dtype="bfloat16", output_dir=str(tmp_path / "out"), total_steps=1)
    assert train(config).metrics["objective/kl"] == 0.0


def test_a_whole_reward_model_is_refused(files, tmp_path):
    whole = tiny.checkpoint(tmp_path / "whole")
    refused(tiny.config(files, "pe-rlhf", reward_model=whole), "reward_model: .* holds no adapter 'reward'")


def test_without_a_reward_it_says_what_to_give(files):
    config = tiny.config(files, "pe-rlhf")
    config.reward_model = None
    refused(config, "reward_model: pe-rlhf needs the output_dir of a `reward` run")


def test_one_base_and_two_adapters(files):
    layout = find("pe-rlhf").layout(TrainConfig(algorithm="pe-rlhf", lora_r=4))
    assert layout.bases == {}
    assert layout.adapters == ("actor", "reward")
    assert layout.trained_bases == ()
