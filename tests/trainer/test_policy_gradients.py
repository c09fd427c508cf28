"""REINFORCE, RLOO, RAFT and SuperHF: advantages, choices and losses by hand, and one update against float64."""

import copy
import math
from types import SimpleNamespace

import pytest
import reference_policy as reference
import tiny
import torch
from test_algorithms import SHAPED, Run, assert_same, files  # noqa: F401  (files is a fixture)

from rlhf_trainer import TrainConfig, train
from rlhf_trainer.algorithms import Counts, raft, reinforce, remax, superhf
from rlhf_trainer.errors import UserError
from rlhf_trainer.rollout import Rollout
from rlhf_trainer.shaping import shape_rewards


def rollout(lengths, scores, logprobs, ref_logprobs, kl_coef=0.5, **changes) -> Rollout:
    """Completions of `lengths` tokens after prompts of one token, with their rewards made."""
    config = TrainConfig(**changes)
    sizes, count = torch.tensor(lengths), len(lengths)
    found = Rollout(
        tokens=torch.zeros(int(sizes.sum()) + count, dtype=torch.int64),
        lengths=sizes + 1,
        prompt_lengths=torch.ones(count, dtype=torch.int64),
        prompt_index=torch.zeros(count, dtype=torch.int64),
        finished=torch.ones(count, dtype=torch.bool),
        captured=torch.tensor(logprobs),
        scores=torch.tensor(scores),
        baselines=torch.zeros(count),
        logprobs=torch.tensor(logprobs),
        ref_logprobs=torch.tensor(ref_logprobs),
    )
    shape_rewards(found, kl_coef, config)
    return found


def three_and_one(**changes) -> Rollout:
    """Log-ratios 0.4, -0.2, 1.0 and 0.8: KL of 1.2 and 0.8; with kl_coef 0.5 returns of 2 - 0.6 and 1 - 0.4."""
    return rollout([3, 1], [2.0, 1.0], [-1.0, -1.0, -1.0, -1.0], [-1.4, -0.8, -2.0, -1.8], **changes)


def test_reinforce_subtracts_the_mean_of_all_returns_so_far():
    state: dict[str, float] = {}
    first, later = three_and_one(), rollout([1, 1], [3.0, 2.0], [-1.0, -1.0], [-1.0, -1.0])
    reinforce.reinforce(first, TrainConfig(), state)
    torch.testing.assert_close(first.advantages, torch.tensor([0.4, 0.4, 0.4, -0.4]))  # 1.4 and 0.6 about 1.0
    reinforce.reinforce(later, TrainConfig(), state)
    torch.testing.assert_close(later.advantages, torch.tensor([1.25, 0.25]))  # about (1.0 + 2.5) / 2
    assert state == {"sum": pytest.approx(3.5), "weight": 2.0}


def test_a_baseline_that_decays_forgets():
    state, config = {"sum": 1.0, "weight": 1.0}, TrainConfig(baseline_decay=0.5)
    later = rollout([1, 1], [3.0, 2.0], [-1.0, -1.0], [-1.0, -1.0])
    reinforce.reinforce(later, config, state)
    torch.testing.assert_close(later.advantages, torch.tensor([1.0, 0.0]))  # about (0.5 * 1.0 + 2.5) / 1.5


def test_rloo_leaves_the_sample_itself_out_and_other_prompts_too():
    """Returns 1, 2, 3, 6 of one prompt and 10, 10, 10, 14 of another."""
    scores = [1.0, 2.0, 3.0, 6.0, 10.0, 10.0, 10.0, 14.0]
    found = rollout([1] * 8, scores, [-1.0] * 8, [-1.0] * 8)
    reinforce.rloo(found, TrainConfig(num_generations=4), {})
    thirds = [-8, -4, 0, 12, -4, -4, -4, 12]
    torch.testing.assert_close(found.advantages, torch.tensor([t / 3 for t in thirds]))


def test_rloo_counts_the_kl_in_the_return_of_the_whole_completion():
    """Two samples of a prompt: returns 1.4 and 0.6. Whichever token the KL is at, all tokens answer for it."""
    for order in ([-1.4, -0.8, -2.0], [-2.0, -1.4, -0.8]):
        found = rollout([3, 1], [2.0, 1.0], [-1.0] * 4, [*order, -1.8])
        reinforce.rloo(found, TrainConfig(num_generations=2), {})
        torch.testing.assert_close(found.advantages, torch.tensor([0.8, 0.8, 0.8, -0.8]))
    free = rollout([3, 1], [2.0, 1.0], [-1.0] * 4, [-1.4, -0.8, -2.0, -1.8], kl_coef=0.0)
    reinforce.rloo(free, TrainConfig(num_generations=2), {})
    torch.testing.assert_close(free.advantages, torch.tensor([1.0, 1.0, 1.0, -1.0]))


def model_of(**fields):
    """A model whose actor says `fields`, whatever it is asked."""
    out = {"actor": SimpleNamespace(**{name: torch.tensor(value) for name, value in fields.items()})}
    return lambda *_, **__: out


def test_the_policy_gradient_sums_a_completion_and_means_over_completions():
    batch = three_and_one()
    batch.advantages = torch.tensor([0.4, 0.4, 0.4, -0.4])
    model = model_of(logprob=[-1.0, -2.0, -3.0, -0.5])
    share = reinforce.loss(model, batch, Counts(4.0, 2.0), TrainConfig())
    assert share.value.item() == pytest.approx(-(0.4 * -6.0 - 0.4 * -0.5) / 2)  # 1.1: unlikely good tokens cost
    by_token = reinforce.loss(model, batch, Counts(4.0, 2.0), TrainConfig(loss="token-mean"))
    assert by_token.value.item() == pytest.approx(2.2 / 4)
    assert remax.loss is reinforce.loss


def test_raft_keeps_the_best_return_of_each_prompt():
    """Scores 2, 1 and 1, 3; the KL of the 3 is 6, which counts with kl_coef 0.5 and does not without."""
    ratios = [0.0, 0.0, 0.0, 6.0]
    for kl_coef, expected in ((0.0, [0, 3]), (0.5, [0, 2])):
        found = rollout([1] * 4, [2.0, 1.0, 1.0, 3.0], ratios, [0.0] * 4, kl_coef=kl_coef)
        assert raft.select(found, TrainConfig(num_generations=2)).tolist() == expected


def test_superhf_chooses_by_the_score_alone():
    found = rollout([1] * 4, [2.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 6.0], [0.0] * 4, kl_coef=0.5)
    assert superhf.select(found, TrainConfig(num_generations=2)).tolist() == [0, 3]
    assert superhf.select(found, TrainConfig(num_generations=4)).tolist() == [3]


def test_raft_means_over_the_tokens_of_the_minibatch():
    batch = rollout([2, 1], [0.0, 0.0], [0.0] * 3, [0.0] * 3)
    share = raft.loss(model_of(logprob=[-1.0, -3.0, -0.5]), batch, Counts(3.0, 2.0), TrainConfig())
    assert share.value.item() == pytest.approx(4.5 / 3)


def test_superhf_means_over_tokens_and_then_over_examples():
    """Cross-entropies (1 + 3) / 2 and 0.5; divergences 0.3 and 0.6, or one below zero, which counts as none."""
    batch = rollout([2, 1], [0.0, 0.0], [0.0] * 3, [0.0] * 3)
    config, counts = TrainConfig(kl_coef=0.5), Counts(3.0, 2.0)
    share = superhf.loss(model_of(logprob=[-1.0, -3.0, -0.5], rkl=[0.2, 0.4, 0.6]), batch, counts, config)
    assert share.value.item() == pytest.approx((2.0 + 0.5 * 0.3 + 0.5 + 0.5 * 0.6) / 2)
    assert share.metrics["loss/kl_avg"].item() == pytest.approx(0.45)
    below = superhf.loss(model_of(logprob=[-1.0, -3.0, -0.5], rkl=[0.2, 0.4, -0.1]), batch, counts, config)
    assert below.value.item() == pytest.approx((2.0 + 0.5 * 0.3 + 0.5) / 2)


def test_superhf_takes_the_divergence_from_the_reference_to_the_policy():
    """pi_0 = (0.8, 0.1, 0.1), pi = (0.4, 0.3, 0.3): 0.335 one way, 0.382 the other."""
    from rlhf_kernels import linear_logprob

    policy, start = (torch.tensor([p]).log() for p in ([0.4, 0.3, 0.3], [0.8, 0.1, 0.1]))
    found = linear_logprob(policy, torch.eye(3), torch.tensor([0]), ref_hidden=start, divergence=("rkl",))
    assert found.rkl.item() == pytest.approx(0.8 * math.log(2) - 0.2 * math.log(3), abs=1e-6)


SAMPLES = {"reinforce": 2, "rloo": 4, "raft": 3, "superhf": 3}


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
@pytest.mark.parametrize("algorithm", SAMPLES)
def test_an_update_equals_the_reference(files, tmp_path, algorithm, rank):  # noqa: F811
    run = Run(
        files,
        algorithm,
        output_dir=str(tmp_path / "out"),
        num_generations=SAMPLES[algorithm],
        lora_r=rank,
        rollout_batch_size=3,
        weight_decay=0.1,
        **SHAPED,
    )
    before = {role: reference.double(net) for role, net in run.nets(tmp_path / "before").items()}
    whole = []
    score = run.phase.sampler.score

    def spy(rollout, *rest):
        score(rollout, *rest)
        whole.append(copy.deepcopy(rollout))

    run.phase.sampler.score = spy
    metrics = run.phase.step(0)
    check = reference.best_of if algorithm in ("raft", "superhf") else reference.policy_gradient
    expected = check(before, run.sequences(whole[0]), whole[0].finished, run.config)
    got = metrics.get("loss/policy_avg", metrics.get("loss/sft", 0.0) + 0.3 * metrics.get("loss/kl_avg", 0.0))
    assert got == pytest.approx(expected, abs=1e-5, rel=1e-5)
    after = run.nets(tmp_path / "after")
    assert_same({role: reference.double(net) for role, net in after.items()}, before)


@pytest.mark.parametrize("algorithm", ["rloo", "raft", "superhf"])
def test_one_sample_a_prompt_is_refused_in_one_line(tmp_path, algorithm):
    with pytest.raises(UserError, match=f"num_generations: is 1; {algorithm} compares .* needs at least 2") as caught:
        train(tiny.config(tmp_path, algorithm, num_generations=1))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_raft_without_a_reference_holds_one_model_and_logs_no_kl(tmp_path, monkeypatch):
    import sys

    module = SimpleNamespace(length=lambda prompts, completions, **_: [float(len(text)) for text in completions])
    monkeypatch.setitem(sys.modules, "lengths", module)
    held_out = tiny.prompts(tmp_path / "eval.jsonl", count=4)
    config = tiny.config(tmp_path, "raft", reward=["lengths:length"], eval_prompts=held_out)
    metrics = train(config).metrics
    assert "objective/kl" not in metrics
    assert "eval/kl" not in metrics
    assert metrics["objective/non_score_reward"] == 0.0
    assert metrics["objective/selected_scores"] > metrics["objective/scores"]


def test_superhf_starts_at_no_divergence(files, tmp_path):  # noqa: F811
    config = tiny.config(files, "superhf", output_dir=str(tmp_path / "out"), total_steps=1)
    assert abs(train(config).metrics["loss/kl_avg"]) < 1e-6


def test_superhfs_weight_of_the_divergence_is_not_adapted(tmp_path):
    with pytest.raises(UserError, match="kl_controller: superhf takes no divergence off its rewards"):
        train(tiny.config(tmp_path, "superhf", kl_controller="adaptive"))
