"""INPO: its loss by hand and in float64, which samples make a pair, when pi_t is refreshed, and whole updates."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import reference_algorithms as reference
import tiny
import torch
from safetensors.torch import load_file
from test_algorithms import Run, assert_same
from test_resume import curve

from rlhf_trainer import train
from rlhf_trainer.algorithms import Counts, find, inpo, with_defaults
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.rollout import Rollout

RANKS = pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
POLICY, REFERENCE, SNAPSHOT = [-1.0, -0.5, -2.0], [-1.2, -0.8, -1.5], [-1.1, -0.6, -1.9]


def rollout(lengths, **fields):
    """Completions of those lengths after prompts of one token."""
    sizes = torch.tensor(lengths)
    zeros = torch.zeros(len(lengths))
    values = {"prompt_index": zeros.long(), "finished": zeros.bool(), "captured": zeros, "baselines": zeros}
    prompts = torch.ones_like(sizes)
    tokens = torch.zeros(int((sizes + 1).sum()), dtype=torch.long)
    return Rollout(tokens, sizes + prompts, prompts, **({"scores": zeros} | values | fields))


def pair_loss(policy, config, reference=REFERENCE, snapshot=SNAPSHOT, lengths=(2, 1)):
    batch = rollout(lengths, ref_logprobs=torch.tensor(reference), snapshot_logprobs=torch.tensor(snapshot))
    model = lambda *_, **__: {"actor": SimpleNamespace(logprob=policy)}  # noqa: E731
    return inpo.loss(model, batch, Counts(float(sum(lengths)), len(lengths) / 2), config)


def test_three_tokens_by_hand():
    """dlog pi 0.5, dlog pi_ref -0.5, dlog pi_t 0.2: h = 0.5 + 0.5/3 - 0.4/3 = 0.533333, and (h - 1)^2 = 0.217778."""
    share = pair_loss(torch.tensor(POLICY), TrainConfig(eta=0.5))
    assert share.value.item() == pytest.approx(0.217778, abs=1e-6)
    assert share.metrics["rewards/margins"].item() == pytest.approx(0.5 * 0.533333, abs=1e-6)
    assert share.metrics["logps/chosen"].item() == -1.5
    assert share.metrics["logps/rejected"].item() == -2.0


def test_the_papers_settings_are_the_defaults():
    config = with_defaults(TrainConfig(algorithm="inpo", model="base"))
    assert (config.num_generations, config.eta, config.rounds) == (8, 7.5e-3, 3)
    assert config.tau_ratio * config.eta == pytest.approx(config.eta / 3)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_loss_and_gradient_agree_with_float64(ratio):
    torch.manual_seed(0)
    lengths = [3, 5, 2, 7, 4, 1]
    policy, anchor, snapshot = (-4 * torch.rand(sum(lengths)) for _ in range(3))
    policy.requires_grad_()
    config = TrainConfig(eta=0.05, tau_ratio=ratio)
    pair_loss(policy, config, anchor.tolist(), snapshot.tolist(), lengths).value.backward()

    exact = policy.detach().double().requires_grad_()
    rows = [x.double().split(lengths) for x in (exact, anchor, snapshot)]
    total = torch.zeros((), dtype=torch.float64)
    for best in range(0, len(lengths), 2):
        p, r, s = (x[best].sum() - x[best + 1].sum() for x in rows)
        tau = ratio * 0.05
        total = total + (p - tau / 0.05 * r - (0.05 - tau) / 0.05 * s - 1 / (2 * 0.05)) ** 2
    (total / 3).backward()
    torch.testing.assert_close(policy.grad, exact.grad.float(), rtol=1e-5, atol=1e-5)


def test_a_step_makes_the_best_likelier_and_the_worst_less_likely():
    policy = torch.tensor(POLICY, requires_grad=True)
    pair_loss(policy, TrainConfig(eta=0.1)).value.backward()
    assert (policy.grad[:2] < 0).all()  # descent raises the best sample's tokens
    assert policy.grad[2] > 0


def test_the_best_sample_of_a_prompt_comes_before_its_worst():
    scores = torch.tensor([1.0, 3.0, -2.0, 0.0, 5.0, 4.0, 6.0, 5.5])
    assert inpo.select(rollout([1] * 8, scores=scores), TrainConfig(num_generations=4)).tolist() == [1, 2, 6, 5]


def test_a_prompt_whose_samples_score_alike_moves_nothing():
    index = inpo.select(rollout([1] * 4, scores=torch.full((4,), 2.0)), TrainConfig(num_generations=4))
    assert index[0] == index[1]


@pytest.mark.parametrize(
    ("rounds", "steps", "borders"),
    [(3, 6, [0, 2, 4]), (3, 7, [0, 3, 5]), (1, 4, [0]), (9, 2, [0, 1])],
)
def test_the_snapshot_is_refreshed_at_the_first_step_of_each_round(rounds, steps, borders):
    config = TrainConfig(algorithm="inpo", lora_r=4, rounds=rounds, total_steps=steps)
    copied = []
    for step in range(steps):
        inpo.begin(SimpleNamespace(copy_adapter=lambda *names, step=step: copied.append((step, *names))), step, config)
    assert copied == [(step, "actor", "snapshot") for step in borders]


def settings(directory, rank=4, **changes):
    values = {"num_generations": 3, "rollout_batch_size": 4, "eta": 0.1}
    return tiny.config(directory, "inpo", lora_r=rank, lora_alpha=2.0 * rank or 1.0, **(values | changes))


def run_of(directory, rank, **changes):
    config = settings(directory, rank, **changes)
    same = {name: value for name, value in vars(config).items() if name not in ("algorithm", "model", "prompts")}
    return Run(directory, "inpo", **same)


@RANKS
def test_an_update_equals_the_reference(tmp_path, rank):
    """Second step of a round, so that policy, pi_t and reference are three different models."""
    shaping = {"missing_eos_penalty": 0.5, "reward_clip": 0.8, "temperature": 0.7}
    run = run_of(tmp_path, rank, total_steps=2, rounds=1, **shaping)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name in run.policy.kept.keys() - run.policy.trained.keys():
            snapshot = run.policy.kept[name]
            snapshot += 0.02 * torch.randn(snapshot.shape, generator=generator)
    before = run.nets(tmp_path / "before")
    seen = []
    score = run.phase.sampler.score

    def spy(rollout, *rest, **options):
        score(rollout, *rest, **options)
        seen.append(copy.deepcopy(rollout))

    run.phase.sampler.score = spy
    metrics = run.phase.step(1)
    losses = reference.inpo(before, run.sequences(seen[0]), seen[0].finished, run.config)
    assert metrics["loss/policy_avg"] == pytest.approx(losses[0], abs=1e-4, rel=1e-5)
    after = run.nets(tmp_path / "after")
    assert_same(after, before)


@RANKS
def test_pi_t_samples_and_stays_while_the_policy_moves(tmp_path, rank):
    """Within a round what was sampled is pi_t's, to rounding, and no longer the policy's; a new round starts level."""
    run = run_of(tmp_path, rank, total_steps=4, rounds=2, learning_rate=0.05)
    away = []
    for step in range(3):
        metrics = run.phase.step(step)
        away.append(float((run.rollout.logprobs - run.rollout.snapshot_logprobs).abs().max()))
        assert metrics["sampling/logp_difference_max"] < 1e-5
    assert away[0] == 0.0
    assert away[1] > 1e-2
    assert away[2] == 0.0


@RANKS
def test_an_interrupted_run_goes_on_from_the_middle_of_a_round_bit_for_bit(tmp_path, rank):
    whole, split = tmp_path / "whole", tmp_path / "split"
    changes = {"total_steps": 8, "rounds": 2, "save_steps": 3, "save_total_limit": 9, "learning_rate": 0.01}
    train(settings(tmp_path, rank, output_dir=str(whole), **changes))
    shutil.copytree(whole, split)
    for step in (6, 8):
        shutil.rmtree(split / f"checkpoint-{step}")
    kept = load_file(split / "checkpoint-3" / "model.safetensors")
    assert any("snapshot" in name for name in kept)
    result = train(settings(tmp_path, rank, output_dir=str(split), resume=True, **changes))
    assert len(result.history) == 5
    assert curve(split) == curve(whole)
    for step in (6, 8):
        one, other = (load_file(place / f"checkpoint-{step}" / "model.safetensors") for place in (whole, split))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_the_policy_without_its_snapshot(tmp_path):
    train(settings(tmp_path))
    assert (tmp_path / "out" / "actor" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "snapshot").exists()
    row = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"rewards/margins", "rewards/accuracies", "objective/kl", "reward"} <= row.keys()


def test_one_sample_a_prompt_is_refused(tmp_path):
    from rlhf_trainer.errors import UserError

    with pytest.raises(UserError, match="num_generations: is 1; inpo compares"):
        with_defaults(settings(tmp_path, num_generations=1))
    assert find("inpo").group == 2
