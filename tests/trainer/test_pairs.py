"""Preference pairs: DPO and R-DPO by hand, against float64 and plain PyTorch, and in what the policy learns."""

import json
import math
import random
import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import reference_algorithms as reference
import tiny
import torch
from test_algorithms import Run, assert_same, transformers_model

from rlhf_trainer import core, train
from rlhf_trainer.algorithms import Counts, find, with_defaults
from rlhf_trainer.algorithms.dpo import pack_pairs, pair_logprobs, pair_loss
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import Preference
from rlhf_trainer.errors import UserError
from rlhf_trainer.models import load_tokenizer

ONE = Counts(3.0, 1.0)


def by_hand(algorithm="dpo", **changes):
    """Two chosen tokens of -1 and -0.5 against one rejected of -2; the reference says -1.2, -0.8 and -1.5."""
    packed = pack_pairs([Preference([5, 6], [7, 8], [9])], torch.device("cpu"))
    policy = pair_logprobs(torch.tensor([-1.0, -0.5, -2.0]), packed)
    reference = pair_logprobs(torch.tensor([-1.2, -0.8, -1.5]), packed)
    lengths = packed.completion_lengths.view(2, -1)
    return pair_loss(policy, reference, lengths, ONE, TrainConfig(algorithm=algorithm, **changes))


def test_three_tokens_by_hand():
    """h = (-1.5 + 2) - (-2 + 1.5) = 1, z = 0.1, and log(1 + e^-0.1) = 0.644397."""
    got = by_hand(beta=0.1)
    assert got.value.item() == pytest.approx(0.644397, abs=1e-6)
    expected = {"chosen": 0.05, "rejected": -0.05, "margins": 0.1, "accuracies": 1.0}
    assert {name: got.metrics[f"rewards/{name}"].item() for name in expected} == pytest.approx(expected)
    assert got.metrics["logps/chosen"].item() == -1.5
    assert got.metrics["logps/rejected"].item() == -2.0


def test_the_longer_winner_of_r_dpo_has_learned_less_by_hand():
    """One token more at alpha = 0.2: z = 0.3 and log(1 + e^-0.3) = 0.554355; dpo has no such term."""
    assert by_hand("r-dpo", beta=0.1, length_coef=0.2).value.item() == pytest.approx(0.554355, abs=1e-6)
    assert by_hand("r-dpo", beta=0.1, length_coef=-0.2).value.item() == pytest.approx(0.744397, abs=1e-6)
    assert by_hand("dpo", beta=0.1, length_coef=0.2).value.item() == by_hand("dpo", beta=0.1).value.item()


def test_smoothed_labels_by_hand():
    """A tenth of the labels turned round: 0.9 * 0.644397 + 0.1 * log(1 + e^0.1) = 0.654397."""
    assert by_hand(beta=0.1, label_smoothing=0.1).value.item() == pytest.approx(0.654397, abs=1e-6)


def test_loss_and_gradient_agree_with_float64():
    torch.manual_seed(0)
    policy, reference = (-40 * torch.rand(2, 16) for _ in range(2))
    lengths = torch.randint(1, 2_000, (2, 16))
    policy.requires_grad_()
    config = TrainConfig(algorithm="r-dpo", beta=0.3, length_coef=0.013, label_smoothing=0.2)
    pair_loss(policy, reference, lengths, Counts(1.0, 16.0), config).value.backward()

    exact = policy.detach().double().requires_grad_()
    h = (exact[0] - exact[1]) - (reference[0] - reference[1]).double()
    z = 0.3 * h + 0.013 * (lengths[0] - lengths[1]).double()
    p = 1 / (1 + torch.exp(-z))
    loss = -(0.8 * torch.log(p) + 0.2 * torch.log(1 - p)).mean()
    loss.backward()
    torch.testing.assert_close(policy.grad, exact.grad.float(), rtol=1e-4, atol=1e-7)


def test_lengths_are_subtracted_in_float32_whatever_the_models_dtype():
    """bf16 has no odd numbers above 256: there 4001 - 4000 tokens would be nothing."""
    zero = torch.zeros(2, 1, dtype=torch.bfloat16)
    config = TrainConfig(algorithm="r-dpo", length_coef=1.0)
    value = pair_loss(zero, zero, torch.tensor([[4001], [4000]]), ONE, config).value
    assert value.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-6)


def settings(directory, algorithm="dpo", rank=4, **changes):
    return tiny.config(directory, algorithm, lora_r=rank, lora_alpha=2.0 * rank or 1.0, **changes)


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
def test_nothing_is_learned_yet_at_step_0_and_the_reference_is_exactly_the_policy(tmp_path, rank):
    first = train(settings(tmp_path, rank=rank, total_steps=1)).history[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
def test_a_precomputed_reference_gives_the_same_curve(tmp_path, rank):
    curves = []
    for ready in (False, True):
        out = str(tmp_path / f"out-{ready}")
        config = settings(tmp_path, rank=rank, total_steps=4, output_dir=out, precompute_ref_logprobs=ready)
        curves.append([row["loss"] for row in train(config).history])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_a_precomputed_reference_needs_no_copy_of_the_model():
    for ready, copies in ((False, 2), (True, 1)):
        config = with_defaults(TrainConfig(algorithm="dpo", model="base", lora_r=0, precompute_ref_logprobs=ready))
        assert 1 + len(find("dpo").layout(config).bases) == copies


def longer_winners(path, count, seed):
    """Pairs of random words in which the winner has three to six words more, and nothing else to say for itself."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = draw.choices(tiny.WORDS, k=14)
        short = draw.randint(1, 3)
        texts = words[:3], words[3 : 6 + short + draw.randint(0, 3)], words[3 : 3 + short]
        rows.append(dict(zip(("prompt", "chosen", "rejected"), map(" ".join, texts))))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_margin_that_length_alone_teaches_shrinks_as_alpha_grows(tmp_path):
    """Where winners are only longer, each unit of alpha leaves r-dpo less to learn; a negative one, more."""
    prompts = longer_winners(tmp_path / "long.jsonl", 64, seed=1)
    fixed = {"prompts": prompts, "total_steps": 25, "per_device_train_batch_size": 16, "learning_rate": 1e-2}
    margins = []
    for alpha in (-1.0, 0.0, 1.0, 2.0):
        out = str(tmp_path / f"out-{alpha}")
        history = train(settings(tmp_path, "r-dpo", output_dir=out, beta=1.0, length_coef=alpha, **fixed)).history
        margins.append(sum(row["rewards/margins"] for row in history[-4:]) / 4)
    assert all(less < 0.85 * more for more, less in pairwise(margins))
    assert margins[-1] > 0


@pytest.mark.parametrize("ready", [False, True], ids=["packed", "precomputed"])
@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapter"])
@pytest.mark.parametrize("algorithm", ["dpo", "r-dpo"])
def test_an_update_equals_the_reference(tmp_path, algorithm, rank, ready):
    """Six pairs in three micro-batches, from a policy that has moved off its reference."""
    config = settings(
        tmp_path,
        algorithm,
        rank,
        beta=0.5,
        length_coef=0.05,
        label_smoothing=0.1,
        weight_decay=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        precompute_ref_logprobs=ready,
    )
    same = {name: value for name, value in vars(config).items() if name not in ("algorithm", "model", "prompts")}
    run = Run(tmp_path, algorithm, **same)
    before = run.nets(tmp_path / "before")
    if "reference" not in before:
        skeleton = transformers_model(config.model)
        weights = {name: value.detach().clone() for name, value in skeleton.state_dict().items()}
        before["reference"] = reference.Net(skeleton, weights)
    batch = [run.phase.rows[i] for i in run.phase.order.at(0)]
    metrics = run.phase.step(0)
    losses = reference.dpo(before, batch, run.config)
    assert metrics["loss"] == pytest.approx(losses[0], abs=1e-5, rel=1e-5)
    assert_same(run.nets(tmp_path / "after"), {"actor": before["actor"]})


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_held_out_prompts_are_completed_and_scored(tmp_path, monkeypatch, algorithm):
    module = types.ModuleType("pair_rewards")
    module.words = lambda prompts, completions, **_: [float(len(text.split())) for text in completions]
    monkeypatch.setitem(sys.modules, "pair_rewards", module)
    held_out = tiny.prompts(tmp_path / "held_out.jsonl", 5)
    config = tiny.config(tmp_path, algorithm, eval_prompts=held_out, reward=["pair_rewards:words"], eval_steps=2)
    train(replace(config, total_steps=4))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/reward" in row] == [0, 2, 4]
    assert all(0 < row["eval/reward"] <= row["eval/mean_length"] for row in rows if "eval/reward" in row)
    if algorithm == "dpo":
        assert rows[0]["eval/kl"] == 0.0
        assert rows[-1]["eval/kl"] != 0.0
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2, 4}


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        ("reward", {"reward": ["a:b"]}, "generates nothing that could be scored"),
        ("dpo", {"reward": ["a:b"]}, "reward: dpo scores completions of eval_prompts alone; give some"),
        ("dpo", {"eval_prompts": "org/prompts"}, "eval_prompts: dpo completes them only to score them; give a reward"),
    ],
)
def test_a_reward_and_held_out_prompts_need_each_other(tmp_path, algorithm, changes, words):
    with pytest.raises(UserError, match=words):
        tiny.config(tmp_path, algorithm, **changes).validate()


def test_prompt_tokens_do_not_count(tmp_path):
    """The summed logprobs are transformers' own of the completion's tokens, given the prompt."""
    config = with_defaults(settings(tmp_path).validate())
    phase, _ = core.build_phase(config, find("dpo"), load_tokenizer(config))
    row = phase.rows[0]
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(config.model)
    for side, name in ((row.chosen, "logps/chosen"), (row.rejected, "logps/rejected")):
        ids = torch.tensor([row.prompt + side])
        logprobs = plain(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        share = find("dpo").loss(phase.model, [row], ONE, config)
        assert share.metrics[name].item() == pytest.approx(logprobs[len(row.prompt) - 1 :].sum().item(), abs=1e-4)
