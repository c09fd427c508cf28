"""Scores and divergences become rewards: formulas against values worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_trainer import TrainConfig
from rlhf_trainer.shaping import KLController, penalty, shape_rewards, shape_scores

POLICY, REFERENCE = 0.5, 0.25  # probabilities of the sampled token, so a = log 2


@pytest.mark.parametrize(
    ("estimator", "policy", "reference", "expected"),
    [
        ("kl", POLICY, REFERENCE, math.log(2)),
        ("kl", REFERENCE, POLICY, -math.log(2)),
        ("clamped_kl", POLICY, REFERENCE, math.log(2)),
        ("clamped_kl", REFERENCE, POLICY, 0.0),
        ("squared_error", REFERENCE, POLICY, math.log(2) ** 2 / 2),
        ("bregman", POLICY, REFERENCE, 0.5 - 1 + math.log(2)),
        ("bregman", REFERENCE, POLICY, 2 - 1 - math.log(2)),
        ("jensen_shannon", POLICY, REFERENCE, 0.5 * math.log(0.5 / 0.375)),
        ("jensen_shannon", REFERENCE, POLICY, 0.5 * math.log(0.5 / 0.375)),
        ("none", POLICY, REFERENCE, 0.0),
    ],
)
def test_each_estimator_gives_the_value_worked_out_by_hand(estimator, policy, reference, expected):
    got = penalty(estimator, torch.tensor([math.log(policy)]), torch.tensor([math.log(reference)]))
    assert got.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["kl", "clamped_kl", "squared_error", "bregman", "jensen_shannon", "none"])
def test_equal_policies_pay_exactly_nothing(estimator):
    logprob = torch.tensor([-0.3, -12.0, -1e-4])
    got = penalty(estimator, logprob, logprob.clone())
    assert not got.any()


def test_the_sampled_jensen_shannon_lies_between_zero_and_half_log_two():
    policy, reference = -torch.rand(1000) * 30, -torch.rand(1000) * 30
    got = penalty("jensen_shannon", policy, reference)
    assert got.min() >= 0
    assert got.max() <= math.log(2) / 2
    assert got.max() > 0.34


@pytest.mark.parametrize("estimator", ["full_kl", "full_js"])
def test_exact_estimators_take_what_the_vocabulary_says(estimator):
    exact = torch.tensor([0.1, 0.2])
    assert torch.equal(penalty(estimator, torch.zeros(2), torch.ones(2), exact), exact)


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="kl_estimator: 'k4'"):
        penalty("k4", torch.zeros(1), torch.zeros(1))


def test_scores_are_clipped_and_unfinished_completions_pay():
    config = TrainConfig(reward_clip=2.0, missing_eos_penalty=1.5)
    got = shape_scores(torch.tensor([5.0, -5.0, 0.5]), torch.tensor([True, False, False]), config)
    assert got.tolist() == [2.0, -3.5, -1.0]


def test_the_score_is_added_at_each_last_real_token():
    rollout = SimpleNamespace(
        logprobs=torch.tensor([-1.0, -1.0, -1.0, -2.0, -2.0]),
        ref_logprobs=torch.tensor([-1.5, -1.0, -0.5, -2.0, -4.0]),
        divergences=torch.empty(0),
        completion_lengths=torch.tensor([3, 2]),
        scores=torch.tensor([10.0, 20.0]),
    )
    shape_rewards(rollout, 0.1, TrainConfig())
    torch.testing.assert_close(rollout.penalties, torch.tensor([-0.05, 0.0, 0.05, 0.0, -0.2]))
    torch.testing.assert_close(rollout.rewards, torch.tensor([-0.05, 0.0, 10.05, 0.0, 19.8]))


def test_the_adaptive_controller_moves_towards_its_target_and_the_fixed_one_stays():
    adaptive = KLController(TrainConfig(kl_coef=0.2, kl_controller="adaptive", kl_target=6.0, kl_horizon=1000.0))
    adaptive.update(6.6, 100)  # 10 % above: grows by 0.1 * 100/1000
    assert adaptive.value == pytest.approx(0.2 * 1.01)
    adaptive.update(0.0, 100)  # far below: the error is bounded at -0.2
    assert adaptive.value == pytest.approx(0.2 * 1.01 * 0.98)
    fixed = KLController(TrainConfig(kl_coef=0.2))
    fixed.update(100.0, 100)
    assert fixed.value == 0.2
