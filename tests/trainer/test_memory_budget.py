"""A memory budget sets the micro-batch and the arena, changes no result, is recorded, and says what does not fit."""

import pytest
import tiny
import yaml

from rlhf_trainer import train
from rlhf_trainer.algorithms import find, with_defaults
from rlhf_trainer.budget import Lengths, fitted, plan_of
from rlhf_trainer.data import Preference, Prompt
from rlhf_trainer.errors import UserError

OPEN = {"per_device_train_batch_size": None, "kv_memory": None}
PROMPTS = [Prompt("", list(range(n)), {}) for n in (3, 6)]


def chosen(directory, algorithm, budget, rows=PROMPTS, **changes):
    row = find(algorithm)
    config = with_defaults(tiny.config(directory, algorithm, memory_budget=budget, **(OPEN | changes)))
    found = fitted(config, row, rows)
    return found, plan_of(found, row, Lengths.of(rows, found))


def test_the_micro_batch_is_the_largest_that_fits(tmp_path):
    whole, planned = chosen(tmp_path, "hydra-ppo", "1GiB", rollout_batch_size=40)
    assert whole.per_device_train_batch_size == 40  # of a minibatch there is no more
    budget = planned.total // 2
    some, planned = chosen(tmp_path, "hydra-ppo", budget, rollout_batch_size=40)
    batch = some.per_device_train_batch_size
    assert 1 < batch < 40
    row, lengths = find("hydra-ppo"), Lengths(6, some.max_completion_length)
    assert planned.total <= budget < plan_of(some, row, lengths, batch + 1).total


def test_the_arena_is_what_the_rollout_needs_or_what_is_left(tmp_path):
    roomy, planned = chosen(tmp_path, "hydra-ppo", "1GiB", num_generations=4)
    tokens = 6 * 4 * (6 + 8)
    assert 1 <= roomy.kv_memory / (tokens * 2 * 2 * 2 * 8 * 4) < 1.2  # layers, keys and values, heads, dims, fp32
    many = {"rollout_batch_size": 600, "per_device_train_batch_size": 1}
    _, planned = chosen(tmp_path, "hydra-ppo", "1GiB", **many)
    others = max(peak for phase, peak in planned.peaks.items() if phase != "rollout")
    budget = (planned.peaks["rollout"] + others) // 2
    _, planned = chosen(tmp_path, "hydra-ppo", budget, **many)
    assert others < planned.peaks["rollout"] <= budget


def test_what_is_given_stays(tmp_path):
    config, _ = chosen(tmp_path, "hydra-ppo", "1GiB", per_device_train_batch_size=3, kv_memory="64KiB")
    assert (config.per_device_train_batch_size, config.kv_memory) == (3, "64KiB")


def test_rows_that_learn_from_a_file_keep_the_pairs_of_a_step(tmp_path):
    rows = [Preference([1, 2, 3], [4, 5, 6, 7], [8, 9])]
    row = find("reward")
    config = with_defaults(tiny.config(tmp_path, "reward", **(OPEN | {"memory_budget": "1GiB"})))
    small = plan_of(config, row, Lengths.of(rows, config), batch=5).total
    config, _ = chosen(tmp_path, "reward", small, rows)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 4)  # 16 in equal parts


def test_a_budget_without_room_names_the_largest_parts(tmp_path):
    with pytest.raises(UserError, match=r"memory_budget: 97.66 KiB does not hold it: .* parts: .*base model .* KiB"):
        chosen(tmp_path, "ppo", "100KB")
    with pytest.raises(UserError, match=r"memory_budget: .*'much'"):
        tiny.config(tmp_path, memory_budget="much").validate()


def test_results_do_not_depend_on_the_budget_and_a_resumed_run_keeps_its_choice(tmp_path, capsys):
    def run(name, **changes):
        config = tiny.config(tmp_path, "hydra-ppo", output_dir=str(tmp_path / name), **(OPEN | changes))
        return train(config).history

    _, planned = chosen(tmp_path, "hydra-ppo", "1GiB")
    free = run("free")
    bound = run("bound", memory_budget=planned.at_batch(4), total_steps=1)
    assert "micro-batches of" in capsys.readouterr().err
    recorded = yaml.safe_load((tmp_path / "bound" / "config.yaml").read_text())
    size = recorded["per_device_train_batch_size"]
    assert size < 6
    bound += run("bound", memory_budget="1GiB", resume=True)
    assert yaml.safe_load((tmp_path / "bound" / "config.yaml").read_text())["per_device_train_batch_size"] == size
    for one, other in zip(free, bound, strict=True):
        for name in ("reward", "loss/policy_avg", "objective/kl", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
