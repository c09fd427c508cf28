"""The memory plan against the trainer's own models and optimiser: the same bytes, to the byte."""

import pytest
import tiny
import torch

from rlhf_kernels.memory import LAYOUTS, plan
from rlhf_kernels.memory_layouts import OTHER, without_reward_copy
from rlhf_trainer.algorithms import TABLE, find, with_defaults
from rlhf_trainer.budget import Lengths, memory_layout, plan_of
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.demo import checkpoint_path
from rlhf_trainer.models import build
from rlhf_trainer.optim import Optimizer


def held_bytes(config: TrainConfig) -> int:
    """Weights, gradients and optimiser state of a run's live tensors after an optimiser step."""
    policy = build(config, find(config.algorithm))
    optimizer = Optimizer(policy.groups, config, total_updates=1)
    for parameter in policy.trained.values():
        parameter.grad = torch.ones_like(parameter)
    gradients = sum(p.grad.nbytes for p in policy.trained.values() if p.grad is not None)
    optimizer.step()
    weights = sum(p.nbytes for p in policy.model.parameters())
    return weights + gradients + sum(t.nbytes for t in optimizer.state_tensors().values())


def configured(algorithm: str, dtype: str, adapters: bool) -> TrainConfig:
    reward = ["any:function"] if find(algorithm).data is None else []
    rank = 4 if adapters else 0
    return with_defaults(TrainConfig(algorithm=algorithm, dtype=dtype, lora_r=rank, reward=reward))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", LAYOUTS)
def test_static_bytes_are_those_the_trainer_holds(algorithm, dtype):
    adapters = bool(LAYOUTS[algorithm].adapters)
    planned = plan(str(checkpoint_path()), algorithm, lora_rank=4, dtype=dtype, reward_model=False)
    assert held_bytes(configured(algorithm, dtype, adapters)) == planned.static


@pytest.mark.parametrize("algorithm", OTHER)
def test_so_are_those_of_rows_that_train_the_other_way(algorithm):
    adapters = bool(OTHER[algorithm].adapters)
    config = configured(algorithm, "float32", adapters)
    path = str(checkpoint_path())
    planned = plan(path, algorithm, lora_rank=4, dtype="float32", reward_model=False, adapters=adapters)
    if algorithm != "raft":  # whose reference is there for the divergence alone, and an adapter's costs nothing
        assert held_bytes(config) == planned.static
    assert plan_of(config, find(algorithm), Lengths(8, 8)).static == held_bytes(config)


@pytest.mark.parametrize("algorithm", TABLE)
def test_the_table_of_layouts_names_the_roles_that_each_row_has(algorithm):
    config = configured(algorithm, "float32", bool(LAYOUTS[algorithm].adapters))
    row, table = find(algorithm), without_reward_copy(LAYOUTS[algorithm])
    own = memory_layout(row, config)
    assert own.trained == table.trained
    assert set(own.scored) == {role for role in table.scored if role in own.roles}
    kept = {name: part for name, part in own.roles.items() if name != "reward"}
    assert kept == {name: part for name, part in table.roles.items() if name != "reward"} or algorithm == "reward"


def test_a_reward_adapter_is_planned_as_weights_alone(tmp_path):
    path = str(checkpoint_path())
    adapter = tiny.reward_adapter(tmp_path / "adapter", path)
    config = with_defaults(TrainConfig(algorithm="pe-rlhf", model=path, prompts="any", reward_model=adapter, lora_r=4))
    policy = build(config, find("pe-rlhf"))
    optimizer = Optimizer(policy.groups, config, total_updates=1)
    for parameter in policy.trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [*policy.model.parameters(), *policy.trained.values(), *optimizer.state_tensors().values()]
    planned = plan(path, "pe-rlhf", lora_rank=4, dtype="float32")
    assert sum(t.nbytes for t in held) == planned.static
    assert {row.name: row.gradients for row in planned.rows}["reward adapter"] == 0
