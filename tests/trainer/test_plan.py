"""The memory plan against the trainer's own models and optimiser: the same bytes, to the byte."""

import pytest
import tiny
import torch

from rlhf_kernels.memory import LAYOUTS, plan
from rlhf_trainer.algorithms import find, with_defaults
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.demo import checkpoint_path
from rlhf_trainer.models import build
from rlhf_trainer.optim import Optimizer

WITH_ADAPTERS = {"lora-ppo", "j-hydra-ppo", "hydra-ppo", "pe-rlhf"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", LAYOUTS)
def test_static_bytes_are_those_the_trainer_holds(algorithm, dtype):
    reward = ["any:function"] if find(algorithm).data is None else []
    rank = 4 if algorithm in WITH_ADAPTERS else 0
    config = with_defaults(TrainConfig(algorithm=algorithm, dtype=dtype, lora_r=rank, reward=reward))
    policy = build(config, find(algorithm))
    optimizer = Optimizer(policy.groups, config, total_updates=1)
    for parameter in policy.trained.values():
        parameter.grad = torch.ones_like(parameter)
    gradients = sum(p.grad.nbytes for p in policy.trained.values() if p.grad is not None)
    optimizer.step()
    weights = sum(p.nbytes for p in policy.model.parameters())
    state = sum(t.nbytes for t in optimizer.state_tensors().values())
    planned = plan(str(checkpoint_path()), algorithm, lora_rank=4, dtype=dtype, reward_model=False)
    assert weights + gradients + state == planned.static


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
