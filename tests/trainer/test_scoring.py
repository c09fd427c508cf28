"""Rewards called while the rollout runs see the same completions in the same groups, whatever finished first."""

import sys
import types

import pytest
import tiny

from rlhf_kernels.generation import SlicedGenerator
from rlhf_trainer import train
from rlhf_trainer.online import Online
from rlhf_trainer.rewards import RewardError


@pytest.fixture
def rewards(monkeypatch):
    """`tiny_rewards:length` and what it was called with."""
    module = types.ModuleType("tiny_rewards")
    module.calls = []

    def length(prompts, completions, **columns):
        module.calls.append((prompts, completions))
        return [float(len(text.split())) for text in completions]

    module.length = length
    monkeypatch.setitem(sys.modules, "tiny_rewards", module)
    return module


def trained(directory, **changes):
    return train(tiny.config(directory, reward=["tiny_rewards:length"], total_steps=1, **changes)).metrics


@pytest.mark.parametrize("algorithm", ["hydra-ppo", "remax"])
def test_early_scores_are_the_scores(tmp_path, rewards, algorithm):
    options = {"algorithm": algorithm, "num_generations": 2} if algorithm == "hydra-ppo" else {"algorithm": algorithm}
    late, early = (trained(tmp_path / str(size), reward_batch_size=size, **options) for size in (None, 4))
    timed = {name for name in late if name.startswith(("timing/", "memory/", "sampling/tokens"))}
    assert {n: v for n, v in early.items() if n not in timed} == {n: v for n, v in late.items() if n not in timed}


def test_groups_are_the_same_at_every_budget_and_in_order(tmp_path, rewards):
    seen = []
    for memory in ("1MiB", "12KiB"):
        rewards.calls.clear()
        trained(tmp_path / memory, reward_batch_size=2, num_generations=2, kv_memory=memory)
        seen.append(list(rewards.calls))
    assert [len(prompts) for prompts, _ in seen[0]] == [4, 4, 4]
    assert seen[0] == seen[1]


def test_a_reward_that_fails_stops_the_rollout_and_gives_its_memory_back(tmp_path, rewards, monkeypatch):
    made = []
    begin = Online.__post_init__
    monkeypatch.setattr(Online, "__post_init__", lambda self: (begin(self), made.append(self))[0])
    monkeypatch.setattr(rewards, "length", lambda prompts, completions, **_: [float("nan")] * len(prompts))
    early = {"reward_batch_size": 1, "max_active": 1, "num_generations": 4}
    with pytest.raises(RewardError, match="not a finite number"):
        train(tiny.config(tmp_path, reward=["tiny_rewards:length"], **early))
    (phase,) = made
    assert phase.sampler.generator.stats.steps > 0
    assert phase.sampler.generator.stats.generated_tokens < 6 * 4 * 8 / 2
    assert not phase.sampler.generator._arena.held


def test_the_rollout_shows_how_far_it_is(tmp_path, rewards, monkeypatch):
    seen = []
    monkeypatch.setattr("rlhf_trainer.metrics.MetricsLog.completed", lambda self, *counts: seen.append(counts))
    trained(tmp_path, num_generations=2)
    assert seen == [(i + 1, 12) for i in range(12)]


def test_the_arena_sleeps_between_rollouts_and_updates(tmp_path, rewards, monkeypatch):
    held = []
    update = Online._update
    monkeypatch.setattr(
        Online, "_update", lambda self, *a: (held.append(self.sampler.generator._arena.held), update(self, *a))[1]
    )
    woken = []
    stream = SlicedGenerator.stream
    monkeypatch.setattr(SlicedGenerator, "stream", lambda self, *a, **k: (woken.append(1), stream(self, *a, **k))[1])
    train(tiny.config(tmp_path, reward=["tiny_rewards:length"], total_steps=3))
    assert held == [False] * 3
    assert len(woken) == 4  # and once for the check before the run
