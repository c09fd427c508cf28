"""What the core does for a row besides its loss: numbers it keeps, completions it chooses, snapshots, warm-up."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rlhf_kernels.nn import Role
from rlhf_trainer import core, train
from rlhf_trainer.algorithms import TABLE, find, with_defaults
from rlhf_trainer.algorithms.base import Layout
from rlhf_trainer.errors import UserError
from rlhf_trainer.models import load_tokenizer
from rlhf_trainer.names import ALGORITHMS, ONLINE


@pytest.fixture
def changed(monkeypatch):
    """Puts a changed copy of a row in its place."""

    def change(name, **changes):
        monkeypatch.setitem(TABLE, name, replace(TABLE[name], **changes))

    return change


def phase_of(config):
    config = with_defaults(config.validate())
    torch.manual_seed(config.seed)
    return core.build_phase(config, find(config.algorithm), load_tokenizer(config))


def test_rows_stand_under_the_names_the_command_line_knows():
    assert set(TABLE) <= set(ALGORITHMS)
    assert {name for name, row in TABLE.items() if row.data is None} == set(TABLE) & set(ONLINE)


def test_a_row_that_keeps_numbers_has_them_after_a_resume(tmp_path, changed):
    def count(rollout, config, state):
        state["steps"] = state.get("steps", 0.0) + 1.0
        rollout.advantages = rollout.penalties

    changed("remax", advantages=count)
    train(tiny.config(tmp_path, "remax", total_steps=2))
    train(tiny.config(tmp_path, "remax", total_steps=3, resume=True))
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "state.json").read_text())
    assert state["phase"]["row"] == {"steps": 3.0}


def test_scores_are_normalised_before_they_are_clipped(tmp_path, changed):
    """Raw scores stay what is logged as the reward; the greedy completions' are normalised by the same call."""
    seen = []

    def normalize(scores, state, config):
        seen.append(scores.clone())
        return 100 * torch.ones_like(scores)

    changed("remax", normalize=normalize)
    phase, _ = phase_of(tiny.config(tmp_path, "remax", reward_clip=3.0))
    metrics = phase.step(0)
    assert [len(scores) for scores in seen] == [12]  # six samples, six greedy ones
    assert metrics["objective/scores"] == metrics["objective/baseline"] == 3.0
    assert metrics["reward"] == pytest.approx(float(seen[0][:6].mean()))


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 100])
def test_groups_stay_together_and_in_order(tmp_path, changed, micro_batch):
    """Pairs of the best and the worst of three samples, of six prompts, cut into two minibatches."""
    pairs, counted = [], []

    def select(rollout, config):
        scores = rollout.scores.view(-1, 3)
        first = 3 * torch.arange(len(scores))
        return torch.stack([first + scores.argmax(1), first + scores.argmin(1)], 1).flatten()

    def loss(model, batch, counts, config):
        pairs.extend(zip(batch.prompt_index.view(-1, 2).tolist(), batch.scores.view(-1, 2).tolist()))
        counted.append(counts)
        return TABLE["raft"].loss(model, batch, counts, config)

    changed("remax", select=select, group=2, loss=loss, greedy_baseline=False, advantages=None)
    config = tiny.config(
        tmp_path, "remax", num_generations=3, num_mini_batches=2, per_device_train_batch_size=micro_batch
    )
    phase, _ = phase_of(config)
    metrics = phase.step(0)
    assert sorted(prompts for prompts, _ in pairs) == [[i, i] for i in range(6)]
    assert all(best >= worst for _, (best, worst) in pairs)
    assert {counts.sequences for counts in counted} == {3.0}
    assert metrics["objective/scores"] != metrics["objective/selected_scores"]
    assert metrics["episode"] == 18


def snapshot_layout(config):
    roles = {name: Role(name, "lm") for name in ("actor", "snapshot")} | {
        "reference": Role(),
        "reward": Role(None, "reward"),
    }
    return Layout(roles, adapters=("actor", "snapshot"), snapshots=("snapshot",))


def test_a_snapshot_is_frozen_kept_in_checkpoints_and_no_result(tmp_path, changed):
    """Taken before step 2; a run resumed at step 3 has it."""
    read = []

    def begin(model, step, config):
        if step == 2:
            model.copy_adapter("actor", "snapshot")

    def watch(rollout, config, state):
        kl = rollout.per_sequence(rollout.logprobs - rollout.snapshot_logprobs)
        read.append(float(kl.abs().sum()))
        TABLE["rloo"].advantages(rollout, config, state)

    scored = ("actor", "reference", "snapshot")
    changed("reinforce", layout=snapshot_layout, begin=begin, advantages=watch, scored=scored)
    settings = {"lora_r": 4, "num_generations": 2, "learning_rate": 1e-2}
    train(tiny.config(tmp_path, "reinforce", total_steps=4, output_dir=str(tmp_path / "whole"), **settings))
    whole, read[:] = list(read), []
    assert whole[0] == whole[2] == 0.0
    assert whole[1] > 0.01
    assert whole[3] > 0.001
    split = {"output_dir": str(tmp_path / "split"), **settings}
    train(tiny.config(tmp_path, "reinforce", total_steps=3, **split))
    result = train(tiny.config(tmp_path, "reinforce", total_steps=4, resume=True, **split))
    assert read == whole
    kept, trained = (load_file(result.output_dir / "checkpoint-4" / f"{n}.safetensors") for n in ("model", "optimizer"))
    assert any("snapshot" in name for name in kept)
    assert not any("snapshot" in name for name in trained)
    assert (result.output_dir / "actor").is_dir()
    assert not (result.output_dir / "snapshot").exists()


def loaded_layout(config):
    roles = {"actor": Role("actor"), "reference": Role(), "reward": Role("reward", "reward")}
    return Layout(roles, adapters=("actor", "reward"), loaded={"reward": "reward_model"})


def test_a_finished_runs_adapter_is_loaded_with_its_head_and_stays(tmp_path, changed, monkeypatch):
    monkeypatch.setattr("rlhf_trainer.config.REWARD_MODEL", ("rloo",))
    changed("rloo", layout=loaded_layout)
    stage = {"output_dir": str(tmp_path / "stage"), "learning_rate": 1e-2, "lora_target_modules": "q_proj,v_proj"}
    first = train(tiny.config(tmp_path, "reward", lora_r=2, **stage))
    config = tiny.config(tmp_path, "rloo", lora_r=4, reward_model=str(first.output_dir), num_generations=2)
    phase, policy = phase_of(config)
    saved = load_file(first.output_dir / "reward" / "adapter_model.safetensors")
    mine = {name: p for name, p in policy.model.named_parameters() if name.endswith(".reward")}
    assert sorted(map(torch.norm, saved.values())) == sorted(map(torch.norm, mine.values()))
    assert all(p.shape[0] == 2 or p.shape[1] == 2 for p in mine.values())
    head = load_file(first.output_dir / "heads.safetensors")["reward.weight"]
    torch.testing.assert_close(policy.model.head("reward").weight, head)
    before = {name: p.clone() for name, p in mine.items()}
    phase.step(0)
    assert all(torch.equal(p, before[name]) for name, p in mine.items())
    with pytest.raises(UserError, match=r"reward_model: .* holds no adapter 'reward'"):
        phase_of(replace(config, reward_model=str(tmp_path / "model")))


def test_only_the_critic_moves_while_it_warms_up(tmp_path):
    phase, policy = phase_of(tiny.config(tmp_path, "hydra-ppo", critic_warmup_steps=2, num_ppo_epochs=1))
    moved = []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in policy.trained.items()}
        phase.step(step)
        moved.append(
            {
                part
                for part in ("actor", "critic")
                for n, p in policy.trained.items()
                if part in n and not torch.equal(p, before[n])
            }
        )
    assert moved == [{"critic"}, {"critic"}, {"actor", "critic"}]


def test_a_warm_up_without_a_critic_is_refused(tmp_path):
    with pytest.raises(UserError, match="critic_warmup_steps: is 2; remax has no critic"):
        train(tiny.config(tmp_path, "remax", critic_warmup_steps=2))


def test_demonstrations_add_their_cross_entropy_to_every_update(tmp_path):
    """The gradient is the sum of the two losses' gradients, and with weight 0 the first alone."""

    def gradient(**changes):
        phase, policy = phase_of(tiny.config(tmp_path, "remax", max_grad_norm=1e9, **changes))
        found = {}

        def step(only=None):
            found.update({name: p.grad.clone() for name, p in policy.trained.items() if p.grad is not None})
            return {"lr": 0.0, "grad_norm": 0.0}

        phase.optimizer.step = step
        return found, phase.step(0)

    rows = tiny.preferences(tmp_path / "demonstrations.jsonl")
    alone, _ = gradient()
    none, _ = gradient(demonstrations=rows, ptx_coef=0.0)
    half, metrics = gradient(demonstrations=rows, ptx_coef=0.5)
    double, _ = gradient(demonstrations=rows, ptx_coef=2.0)
    assert 1 < metrics["loss/ptx"] < 10
    for name, g in alone.items():
        torch.testing.assert_close(none[name], g)
        torch.testing.assert_close(double[name] - g, 4 * (half[name] - g), atol=2e-5, rtol=1e-3)
    assert any((half[name] - g).abs().max() > 1e-3 for name, g in alone.items())


def test_a_run_with_demonstrations_resumes_bit_for_bit(tmp_path):
    rows = tiny.preferences(tmp_path / "demonstrations.jsonl")
    ends = []
    for name, stages in (("whole", (4,)), ("split", (2, 4))):
        for total in stages:
            settings = {"demonstrations": rows, "total_steps": total, "resume": total != stages[0]}
            train(tiny.config(tmp_path, "remax", output_dir=str(tmp_path / name), **settings))
        ends.append(load_file(tmp_path / name / "checkpoint-4" / "model.safetensors"))
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_demonstrations_are_for_rows_that_sample(tmp_path):
    rows = tiny.preferences(tmp_path / "demonstrations.jsonl")
    with pytest.raises(UserError, match="demonstrations: sft learns from"):
        train(tiny.config(tmp_path, "sft", demonstrations=rows))
