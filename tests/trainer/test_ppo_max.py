"""PPO-max: rewards by running statistics, clipped advantages, a critic trained first, demonstrations beside."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import reference_algorithms as reference
import tiny
import torch
from test_algorithms import Run, assert_same

from rlhf_trainer import TrainConfig, train
from rlhf_trainer.algorithms import find, ppo, ppo_max
from rlhf_trainer.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny.checkpoint(directory / "model", seed=0)
    tiny.checkpoint(directory / "reward_model", seed=1)
    return directory


def test_rewards_are_normalised_by_all_seen_so_far():
    """By hand: 1, 3 have mean 2 and deviation 1; with 5, 5 the mean is 3.5 and the variance 11/4."""
    state = {}
    first = ppo_max.normalize(torch.tensor([1.0, 3.0]), state, TrainConfig())
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]))
    second = ppo_max.normalize(torch.tensor([5.0, 5.0]), state, TrainConfig())
    torch.testing.assert_close(second, torch.full((2,), 1.5 / math.sqrt(11 / 4)))
    assert state == {"reward_count": 4, "reward_mean": 3.5, "reward_squares": 11.0}
    assert second.dtype == torch.float32


def test_running_statistics_are_those_of_the_whole_history_however_far_from_zero():
    batches = [1e4 + torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (64, 3, 1, 200)]
    state, seen = {}, torch.cat(batches).double()
    for batch in batches:
        last = ppo_max.normalize(batch, state, TrainConfig())
    expected = (batches[-1].double() - seen.mean()) / seen.std(correction=0)
    torch.testing.assert_close(last.double(), expected, atol=1e-6, rtol=1e-6)


def test_rewards_that_do_not_vary_are_nothing_and_not_noise():
    state = {}
    for _ in range(2):
        assert not ppo_max.normalize(torch.full((4,), 0.1), state, TrainConfig()).any()


def test_three_tokens_by_hand():
    """Rewards -0.1, 0.2, 1 - 0.3 and values 0.5, 0, 0.2 under gamma 1, lambda 1/2, and a one-token completion.

    delta: -0.1 + 0 - 0.5 = -0.6, 0.2 + 0.2 - 0 = 0.4, 0.7 - 0.2 = 0.5; A: -0.275, 0.65, 0.5. Alone: -1 - 0.4 = -1.4.
    """
    rollout = SimpleNamespace(
        rewards=torch.tensor([-0.1, 0.2, 0.7, -1.0]),
        values=torch.tensor([0.5, 0.0, 0.2, 0.4]),
        completion_lengths=torch.tensor([3, 1]),
    )
    config = TrainConfig(gamma=1.0, lam=0.5, advantage_clip=1.0)
    ppo.advantages(rollout, config, {})
    raw = torch.tensor([-0.275, 0.65, 0.5, -1.4])
    white = (raw - raw.mean()) / raw.std(correction=0)
    assert white[3] < -1 < white[0]
    torch.testing.assert_close(rollout.advantages, white.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.returns, raw + rollout.values)  # what the critic learns is not clipped


def stage(files, tmp_path, rank, **changes):
    """A run about to step, on one base or on whole models with a reward model of its own."""
    models = {} if rank else {"reward_model": str(files / "reward_model")}
    clips = {"reward_clip": 0.9, "advantage_clip": 0.8, "missing_eos_penalty": 0.25, "cliprange_value": 0.1}
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 3e-3, "lora_r": rank, "max_grad_norm": 0.3}
    settings = {"critic_warmup_steps": 0, "num_ppo_epochs": 2, "kl_coef": 0.3, "temperature": 0.7}
    return Run(files, "ppo-max", output_dir=str(tmp_path / "out"), **(clips | rates | models | settings | changes))


LAYOUTS = pytest.mark.parametrize("rank", [0, 4], ids=["whole", "one-base"])


@LAYOUTS
@pytest.mark.parametrize("ptx", [False, True], ids=["ppo", "ptx"])
def test_an_update_equals_the_reference(files, tmp_path, rank, ptx):
    shown = {"demonstrations": tiny.preferences(tmp_path / "shown.jsonl"), "ptx_coef": 0.4} if ptx else {}
    run = stage(files, tmp_path, rank, **shown)
    rows = [run.phase.mixed.at(epoch) for epoch in range(2)] if ptx else []
    batches = [[(d.prompt, d.completion) for d in (run.phase.demonstrations[i] for i in row)] for row in rows]
    before = run.nets(tmp_path / "before")
    metrics = run.phase.step(0)
    losses = reference.ppo(
        before, run.sequences(), run.rollout.finished, run.config, seen=[], demonstrations=batches or None
    )
    got = metrics["loss/policy_avg"] + run.config.vf_coef * metrics["loss/value_avg"]
    assert got == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert_same(run.nets(tmp_path / "after"), before)


def test_the_second_rollout_is_normalised_with_the_first(files, tmp_path):
    run, raw, shaped = stage(files, tmp_path, 4, reward_clip=None, missing_eos_penalty=None), [], []
    read = run.phase.sampler.score

    def spy(rollout, *rest):
        read(rollout, *rest)
        raw.append(rollout.scores.clone())

    run.phase.sampler.score = spy
    for step in range(2):
        run.phase.step(step)
        shaped.append(run.rollout.scores)
    seen = torch.cat(raw).double()
    expected = (raw[1].double() - seen.mean()) / seen.std(correction=0)
    torch.testing.assert_close(shaped[1].double(), expected, atol=1e-6, rtol=1e-5)
    assert run.phase.state()["row"]["reward_count"] == len(seen)


@LAYOUTS
def test_in_the_warm_up_only_the_critic_learns(files, tmp_path, rank):
    run = stage(files, tmp_path, rank, critic_warmup_steps=1)
    before, expected = run.nets(tmp_path / "before"), run.nets(tmp_path / "expected")
    run.phase.step(0)
    after = run.nets(tmp_path / "after")
    for name, value in before["actor"].weights.items():
        assert torch.equal(after["actor"].weights[name], value), name
    for module, pair in before["actor"].adapter.items():
        assert all(torch.equal(a, b) for a, b in zip(after["actor"].adapter[module], pair)), module
    untouched = copy.copy(run.config)
    untouched.learning_rate = 0.0
    reference.ppo(expected, run.sequences(), run.rollout.finished, untouched, seen=[])
    assert_same({"critic": after["critic"]}, {"critic": expected["critic"]})
    assert not torch.equal(after["critic"].head, before["critic"].head)
    run.phase.step(1)
    moved = run.nets(tmp_path / "moved")["actor"]
    pairs = moved.adapter.items() if rank else {name: (value,) for name, value in moved.weights.items()}.items()
    was = after["actor"].adapter if rank else {name: (value,) for name, value in after["actor"].weights.items()}
    assert all(not torch.equal(values[0], was[name][0]) for name, values in pairs)


@LAYOUTS
def test_the_critic_starts_as_the_reward_model(files, tmp_path, rank):
    models = {} if rank else {"reward_model": str(files / "reward_model")}
    run = Run(files, "ppo-max", moved=False, output_dir=str(tmp_path / "out"), lora_r=rank, **models)
    nets = run.nets(tmp_path / "nets")
    assert torch.equal(nets["critic"].head, nets["reward"].head)
    assert all(torch.equal(nets["critic"].weights[name], value) for name, value in nets["reward"].weights.items())


def test_one_base_has_no_place_for_another_reward_model(files, tmp_path):
    config = tiny.config(tmp_path, "ppo-max", lora_r=4, reward_model=str(files / "reward_model"))
    with pytest.raises(UserError, match="reward_model: ppo-max with lora_r > 0"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_defaults_are_those_of_the_paper_and_its_authors(tmp_path):
    row = find("ppo-max")
    assert row.defaults["kl_coef"] == 0.05
    assert row.defaults["critic_warmup_steps"] > 0
    assert row.defaults["lora_r"] == 0
    layout = row.layout(TrainConfig(algorithm="ppo-max", lora_r=0))
    assert 1 + len(layout.bases) == 4
    assert layout.head_source == layout.bases["critic"] == "reward_model"


def test_running_statistics_are_in_the_checkpoint(tmp_path):
    train(tiny.config(tmp_path, "ppo-max", lora_r=4, total_steps=3))
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "state.json").read_text())["phase"]["row"]
    assert state["reward_count"] == 18
    assert state["reward_squares"] > 0
