"""The optimiser: schedules, clipping by group, fp32 masters and a state that can be carried over."""

import pytest
import torch
from torch import nn

from rlhf_trainer import TrainConfig
from rlhf_trainer.optim import Optimizer, schedule


def config(**changes):
    return TrainConfig(**({"learning_rate": 0.1, "weight_decay": 0.0, "adam_beta2": 0.999} | changes))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_the_rate_warms_up_and_then_follows_its_schedule(kind, expected):
    got = [schedule(config(lr_scheduler_type=kind, warmup_steps=2), update, 6) for update in range(6)]
    assert got == pytest.approx(expected, abs=1e-4)


def test_groups_learn_at_their_own_rates_and_are_clipped_apart():
    small, large = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = Optimizer({"actor": (0.1, {"a": small}), "critic": (0.2, {"b": large})}, config(max_grad_norm=1.0), 10)
    small.grad, large.grad = torch.full((2, 2), 0.1), torch.full((2, 2), 1000.0)
    norm = optimizer.step()["grad_norm"]
    assert norm == pytest.approx(2000, rel=1e-4)
    assert small[0, 0].item() == pytest.approx(-0.1, rel=1e-3)  # a critic far off leaves the actor's step alone
    assert large[0, 0].item() == pytest.approx(-0.2, rel=1e-3)


def test_matrices_decay_and_vectors_do_not():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer({"actor": (0.1, {"m": matrix, "v": vector})}, config(weight_decay=0.5), 10)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert matrix[0, 0].item() == pytest.approx(0.95)
    assert vector[0].item() == 1.0


def test_low_precision_weights_keep_the_small_steps_that_bfloat16_would_lose():
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimizer = Optimizer({"actor": (1e-3, {"w": weight})}, config(), 100)
    for _ in range(20):  # each step is a quarter of bfloat16's spacing at 1
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.item() == pytest.approx(0.98, abs=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_carried_over_state_takes_the_same_next_step(dtype):
    def fresh():
        torch.manual_seed(0)
        return nn.Parameter(torch.randn(3, 2).to(dtype))

    whole, split = fresh(), fresh()
    gradients = [torch.randn(3, 2).to(dtype) for _ in range(4)]
    first = Optimizer({"actor": (0.1, {"w": whole})}, config(), 4)
    for gradient in gradients:
        whole.grad = gradient.clone()
        first.step()
    before = Optimizer({"actor": (0.1, {"w": split})}, config(), 4)
    for gradient in gradients[:2]:
        split.grad = gradient.clone()
        before.step()
    after = Optimizer({"actor": (0.1, {"w": split})}, config(), 4)
    after.load_state_tensors({k: v.clone() for k, v in before.state_tensors().items()}, before.updates)
    for gradient in gradients[2:]:
        split.grad = gradient.clone()
        after.step()
    assert torch.equal(whole, split)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer({"actor": (0.1, {"w": weight})}, config(), 10)
    weight.grad = torch.full((2, 2), float("nan"))
    with pytest.raises(FloatingPointError, match="gradient norm is nan at optimiser step 1"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(2, 2))
