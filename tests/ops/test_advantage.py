"""`gae` by hand and against the loop, with masks, lengths, gradients; `masked_whiten` alone and in a process group."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.advantage import gae, masked_whiten
from rlhf_kernels.ops.advantage.api import _gae, _gae_backward
from rlhf_kernels.ops.advantage.whiten import _masked_moments

pytestmark = pytest.mark.usefixtures("device")

NAN = float("nan")
BACKENDS = [
    "naive",
    pytest.param("native", marks=pytest.mark.skipif(not registry.native_available(), reason="not built")),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", request.param)
    return request.param


def padded_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float, last_value: Tensor) -> Tensor:
    """The loop over time of the usual PPO code, all rows at once, no mask."""
    running, next_value, out = torch.zeros_like(last_value), last_value, []
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        next_value = values[:, t]
        out.append(running)
    return torch.stack(out[::-1], 1)


def random_rows(b: int, t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator(torch.get_default_device()).manual_seed(b * 1000 + t)
    rewards, values = torch.randn(2, b, t, generator=g, dtype=dtype)
    return rewards, values, torch.randn(b, generator=g, dtype=dtype)


# ---- gae ----


def test_gae_by_hand(backend: str) -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, -1.0]])
    advantages, returns = gae(rewards, values, gamma=0.5, lam=0.5, last_value=torch.tensor([4.0]))
    # deltas: 1 + .5 - .5 = 1;  0 - .5 - 1 = -1.5;  2 + 2 + 1 = 5.  A_2 = 5, A_1 = -1.5 + 5/4, A_0 = 1 - .25/4
    assert advantages.tolist() == [[0.9375, -0.25, 5.0]]
    assert returns.tolist() == [[1.4375, 0.75, 4.0]]


def test_gamma_and_lambda_one_give_the_reward_to_go(backend: str) -> None:
    rewards, values, _ = random_rows(3, 20)
    _, returns = gae(rewards, values, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 7), (8, 64), (9, 63), (21, 130)], ids=str)
def test_gae_equals_the_textbook_loop_to_the_bit(backend: str, b: int, t: int, dtype: torch.dtype) -> None:
    rewards, values, last = random_rows(b, t, dtype)
    advantages, returns = gae(rewards, values, gamma=0.99, lam=0.95, last_value=last)
    assert torch.equal(advantages, padded_loop(rewards, values, 0.99, 0.95, last))
    assert torch.equal(returns, advantages + values)


@pytest.mark.parametrize("holes", [False, True], ids=["tails", "holes"])
def test_masked_tokens_do_not_exist(backend: str, holes: bool) -> None:
    b, t = 11, 40
    rewards, values, last = random_rows(b, t)
    g = torch.Generator(torch.get_default_device()).manual_seed(1)
    mask = torch.rand(b, t, generator=g) < 0.6 if holes else torch.arange(t) < torch.arange(b)[:, None] * 4
    poisoned = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
    advantages, returns = gae(*poisoned, mask, gamma=0.9, lam=0.8, last_value=last)
    for i in range(b):
        valid = mask[i]
        if valid.any():
            alone = gae(
                rewards[i, valid][None],
                values[i, valid][None],
                gamma=0.9,
                lam=0.8,
                last_value=last[i : i + 1],
            )
            assert torch.equal(advantages[i, valid], alone[0][0])
            assert torch.equal(returns[i, valid], alone[1][0])
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_flat_sequences_equal_padded_rows(backend: str) -> None:
    lengths = torch.tensor([3, 0, 12, 1, 7, 7, 0, 9, 12, 2])
    rewards, values, last = random_rows(10, 12)
    mask = torch.arange(12) < lengths[:, None]
    padded = gae(rewards, values, mask.long(), last_value=last)
    for kind in (torch.int64, torch.int32):
        flat = gae(rewards[mask], values[mask], lengths=lengths.to(kind), last_value=last)
        assert torch.equal(flat[0], padded[0][mask])
        assert torch.equal(flat[1], padded[1][mask])


def test_half_inputs_are_computed_in_fp32(backend: str) -> None:
    rewards, values, _ = (x.bfloat16() for x in random_rows(4, 30))
    advantages, returns = gae(rewards, values)
    assert advantages.dtype == returns.dtype == torch.float32
    assert torch.equal(advantages, gae(rewards.float(), values.float())[0])


def test_empty_and_strided_inputs(backend: str) -> None:
    assert gae(torch.zeros(0, 5), torch.zeros(0, 5))[0].shape == (0, 5)
    assert gae(torch.zeros(3, 0), torch.zeros(3, 0))[0].shape == (3, 0)
    assert gae(torch.zeros(0), torch.zeros(0), lengths=torch.zeros(0, dtype=torch.int64))[0].shape == (0,)
    rewards, values, _ = random_rows(6, 9)
    transposed = gae(rewards.t().contiguous().t(), values.t().contiguous().t())
    assert torch.equal(transposed[0], gae(rewards, values)[0])


@pytest.mark.parametrize("masked", ["none", "tails", "holes"])
def test_gae_gradients(backend: str, masked: str) -> None:
    b, t = 9, 5
    rewards, values, last = (x.requires_grad_() for x in random_rows(b, t, torch.float64))
    mask = {
        "none": None,
        "tails": torch.arange(t) < (torch.arange(b) % (t + 1))[:, None],
        "holes": torch.rand(b, t) < 0.5,
    }[masked]

    def run(r: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        return gae(r, v, mask, gamma=0.9, lam=0.7, last_value=last)

    assert torch.autograd.gradcheck(run, (rewards, values, last))


def test_gae_gradients_reach_bf16_inputs(backend: str) -> None:
    rewards, values, _ = (x.bfloat16().requires_grad_() for x in random_rows(2, 6))
    gae(rewards, values)[0].sum().backward()
    for x in (rewards, values):
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16


def test_the_gae_ops_are_registered_properly(backend: str) -> None:
    rewards, values, last = random_rows(3, 4)
    starts = torch.arange(4) * 4
    inputs = [x.flatten().requires_grad_() for x in (rewards, values)]
    for mask in (None, torch.rand(12) < 0.5):
        torch.library.opcheck(_gae, (*inputs, mask, starts, last.requires_grad_(), 0.9, 0.8))
        torch.library.opcheck(_gae_backward, (rewards.flatten(), mask, starts, 0.9, 0.8))


def test_gae_compiles_into_one_graph() -> None:
    compiled = torch.compile(lambda r, v, m: gae(r, v, m), fullgraph=True, dynamic=True, backend="aot_eager")
    for b, t in ((3, 5), (7, 11)):
        rewards, values, _ = random_rows(b, t)
        mask = torch.rand(b, t) < 0.5
        torch.testing.assert_close(compiled(rewards, values, mask), gae(rewards, values, mask))


ROWS = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3)}
FLAT = {"rewards": torch.zeros(6), "values": torch.zeros(6)}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {**ROWS, "rewards": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "rewards must be a floating-point tensor",
        ),
        (
            {**ROWS, "values": torch.zeros(2, 4)},
            ValueError,
            r"values must have rewards' shape \(2, 3\), got \(2, 4\)",
        ),
        ({**ROWS, "mask": torch.zeros(2)}, TypeError, "mask must be a bool or integer tensor"),
        ({**ROWS, "mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask must have rewards' shape"),
        (
            {**ROWS, "lengths": torch.tensor([3, 3])},
            ValueError,
            "rewards must be flat where lengths is given",
        ),
        (FLAT, ValueError, r"rewards must be \[B, T\], or flat with lengths"),
        ({**FLAT, "lengths": torch.tensor([3.0, 3.0])}, TypeError, "lengths must be an integer tensor"),
        (
            {**FLAT, "lengths": torch.tensor([3, 4])},
            ValueError,
            "lengths must sum to the number of tokens, 6, got 7",
        ),
        ({**FLAT, "lengths": torch.tensor([7, -1])}, ValueError, "lengths must be >= 0, got -1"),
        ({**ROWS, "gamma": 1.5}, ValueError, r"gamma must be in \[0, 1\], got 1.5"),
        ({**ROWS, "lam": "1"}, TypeError, "lam must be a number"),
        ({**ROWS, "last_value": torch.zeros(3)}, ValueError, r"last_value must have shape \(2,\)"),
    ],
    ids=lambda x: "",
)
@pytest.mark.host
def test_gae_names_bad_arguments(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gae(**arguments)


# ---- masked_whiten ----


def test_whitened_entries_have_mean_zero_and_variance_one() -> None:
    x = torch.randn(6, 50) * 3 + 100
    mask = torch.arange(50) < torch.tensor([50, 3, 0, 20, 49, 1])[:, None]
    out = masked_whiten(x.masked_fill(~mask, NAN), mask)
    kept = x[mask].double()
    expected = (kept - kept.mean()) / (kept.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(out[mask].double(), expected, rtol=2e-5, atol=2e-5)
    assert not out[~mask].any()
    assert out.dtype == torch.float32
    unshifted = masked_whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(unshifted[mask].double(), expected + kept.mean(), rtol=1e-6, atol=1e-5)


def test_whitening_without_a_mask_takes_every_entry() -> None:
    x = torch.randn(4, 9)
    assert torch.equal(masked_whiten(x), masked_whiten(x, torch.ones(4, 9, dtype=torch.int64)))


def test_no_or_one_valid_entry_gives_no_nan() -> None:
    x = torch.tensor([NAN, 3.0, NAN])
    assert masked_whiten(x, torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]
    assert masked_whiten(x, torch.tensor([0, 1, 0])).tolist() == [0, 0, 0]
    assert masked_whiten(x, torch.tensor([0, 1, 0]), shift_mean=False).tolist() == [0, 3, 0]
    assert masked_whiten(torch.full((5,), 7.0)).tolist() == [0] * 5
    assert masked_whiten(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_gradients(shift_mean: bool) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask, shift_mean=shift_mean), (x,))


def test_the_moments_op_is_registered_properly() -> None:
    torch.library.opcheck(_masked_moments, (torch.randn(7, requires_grad=True), torch.arange(7) < 4))


def test_whitening_compiles_into_one_graph() -> None:
    x, mask = torch.randn(5, 8), torch.rand(5, 8) < 0.5
    compiled = torch.compile(masked_whiten, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), masked_whiten(x, mask))


def group_rows() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(8, 30, generator=g) + 5, torch.rand(8, 30, generator=g) < 0.7


def whiten_my_rows(process: int, folder: str) -> None:
    """Process 0 is the spawned one, -1 the test's own."""
    rank, patience = process + 1, timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    x, mask = group_rows()
    mine = slice(0, 2) if rank == 0 else slice(2, 8)
    for shift in (True, False):
        out = masked_whiten(x[mine], mask[mine], shift_mean=shift, group=dist.group.WORLD)
        torch.testing.assert_close(out, masked_whiten(x, mask, shift_mean=shift)[mine], rtol=1e-6, atol=1e-6)
    empty = masked_whiten(x[mine], mask[mine] & (rank == 1), group=dist.group.WORLD)
    alone = masked_whiten(x[2:], mask[2:])
    torch.testing.assert_close(empty, alone if rank == 1 else torch.zeros(2, 30), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="x requires grad"):
        masked_whiten(x.requires_grad_(), group=dist.group.WORLD)
    dist.barrier()  # nobody leaves while the other still talks to it
    dist.destroy_process_group()
    if rank == 1:
        os._exit(0)  # gloo's threads may outlive the group and abort an ordinary exit


@pytest.mark.host
def test_a_group_whitens_as_one_process_would(tmp_path: Path) -> None:
    spawned = torch.multiprocessing.spawn(whiten_my_rows, args=(str(tmp_path),), nprocs=1, join=False)
    whiten_my_rows(-1, str(tmp_path))
    assert spawned.join(timeout=120)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.arange(3),), TypeError, "x must be a floating-point tensor, got torch.int64"),
        ((torch.zeros(3), torch.zeros(3)), TypeError, "mask must be a bool or integer tensor"),
        ((torch.zeros(3), torch.ones(2, dtype=torch.bool)), ValueError, r"mask must have x's shape \(3,\)"),
    ],
    ids=["integers", "float mask", "shape"],
)
@pytest.mark.host
def test_whitening_names_bad_arguments(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        masked_whiten(*arguments)
