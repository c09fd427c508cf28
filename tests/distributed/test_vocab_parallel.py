"""linear_logprob over a vocabulary split over processes is linear_logprob: every field, gradient and way of saving."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_processes import run_ranks
from ops.head_cases import (
    BF16,
    DISTRIBUTION_FIELDS,
    EVERY_FIELD,
    F16,
    F32,
    OPTIONS,
    Case,
    identify,
    pairwise,
)
from torch import Tensor

from rlhf_kernels import linear_logprob, masked_whiten

pytestmark = pytest.mark.host

# Of |sharded - whole| / (1 + |whole|) for a field, of norms for a gradient, which is rounded to its leaf's dtype.
FIELD_BOUND = 2e-5
GRADIENT_BOUND = {F32: 2e-5, BF16: 4e-3, F16: 1e-3}

FACTORS: dict[str, tuple] = {
    "dtype": (F32, BF16, F16),
    "rows": (1, 7, 33),
    "vocabulary": (123, 1031),
    "split": ("even", "uneven", "thin"),
    **(OPTIONS | {"ignored": (*OPTIONS["ignored"], "all")}),
}


def possible(row: dict[str, Any]) -> bool:
    return not (
        (row["save"] == "grad_vector" and row["train"]) or (row["upstream"] != "signed" and len(row["grads"]) == 1)
    )


EVERYTHING = {
    "rows": 33, "vocabulary": 1031, "split": "uneven", "temperature": "per row", "softcap": 20.0, "logit_scale": 0.75,
    "ignored": (0, 3, 5), "upstream": "signed", "bias": True, "lora": True, "own_reference": True,
}  # fmt: skip
ROWS = [
    *pairwise(FACTORS, possible),
    *(
        {**EVERYTHING, "dtype": dtype, "grads": fields, "train": save != "grad_vector", "save": save}
        for dtype, fields in ((F32, EVERY_FIELD), (BF16, EVERY_FIELD), (F16, DISTRIBUTION_FIELDS))  # e^-k1 > fp16's
        for save in FACTORS["save"]
    ),
]


def shard_of(vocabulary: int, split: str) -> slice:
    """This rank's rows of the weight: equal shares, shares that grow with the rank, or one row on all but the last."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if split == "thin":
        ends = [*range(1, world), vocabulary]
    elif split == "uneven":
        ends = [vocabulary * r * (r + 1) // (world * (world + 1)) for r in range(1, world + 1)]
    else:
        ends = [vocabulary * r // world for r in range(1, world + 1)]
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def sharded(split: str, group: Any = None) -> Any:
    """linear_logprob of whole matrices, of which it sees this rank's rows only."""

    def function(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        mine = shard_of(weight.shape[0], split)
        for name in ("bias", "ref_weight"):
            if options[name] is not None:
                options[name] = options[name][mine]
        if options.get("lora") is not None:
            a, b, index, scaling = options["lora"]
            options["lora"] = (a, b[:, mine], index, scaling)
        return linear_logprob(hidden, weight[mine], target, tp_group=group or dist.group.WORLD, **options)

    return function


def difference(options: dict[str, Any]) -> dict[str, float]:
    """name -> the sharded call's difference from the whole one, fields and gradients."""
    options = dict(options)
    split = options.pop("split")
    case = Case(**options)
    whole, whole_grads = case.run(linear_logprob, lambda x: x)
    part = sharded(split)
    mine, grads = case.run(lambda *args, **kwargs: part(*args, save=case.save, **kwargs), lambda x: x)
    assert whole.keys() == mine.keys()
    assert whole_grads.keys() == grads.keys()
    found = {n: float(((mine[n] - x).abs() / (1 + x.abs())).amax()) if x.numel() else 0.0 for n, x in whole.items()}
    rows = shard_of(case.weight.shape[0], split)
    for name, gradient in whole_grads.items():
        got = grads[name]
        if name in ("weight", "bias"):
            gradient, got = gradient[rows], got[rows]
        elif name == "lora_b":
            gradient, got = gradient[:, rows], got[:, rows]
        # a shard that has hardly any gradient is held to the whole one's size
        size = max(float(gradient.double().norm()), 1e-3 * float(whole_grads[name].double().norm()), 1e-9)
        found[f"d {name}"] = float((got.double() - gradient.double()).norm()) / size
        if case.target.eq(-100).all():
            assert not got.any(), name
    return found


def differences(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [difference(row) for row in rows]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_field_and_gradient_is_that_of_the_whole_vocabulary(world: int) -> None:
    largest: dict[tuple, float] = {}
    for found in run_ranks(
        world,
        differences,
        ROWS,
    ):
        for row, errors in zip(ROWS, found):
            bounds = {n: GRADIENT_BOUND[row["dtype"]] if n.startswith("d ") else FIELD_BOUND for n in errors}
            for name, error in errors.items():
                key = str(row["dtype"]), name
                largest[key] = max(largest.get(key, 0.0), error)
                assert error <= bounds[name], (name, error, identify(row))
    for (dtype, name), error in sorted(largest.items()):
        print(f"{world} processes  {dtype:15} {name:12} {error:.1e}")


def two_groups() -> tuple[float, float]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, place = groups[dist.get_rank() // 2], dist.get_rank() % 2
    torch.manual_seed(dist.get_rank() // 2)  # each group has a model and rows of its own
    hidden, weight, target = torch.randn(5, 16, requires_grad=True), torch.randn(61, 16), torch.randint(61, (5,))
    own = slice(0, 20) if place == 0 else slice(20, 61)
    out = linear_logprob(hidden, weight[own], target, entropy=True, tp_group=mine)
    (out.logprob - out.entropy.detach()).sum().backward()
    got, hidden.grad = hidden.grad, None
    whole = linear_logprob(hidden, weight, target, entropy=True)
    whole.logprob.sum().backward()
    errors = [(out.logprob - whole.logprob).abs().max(), (out.entropy - whole.entropy).abs().max()]
    return float(max(errors).detach()), float((got - hidden.grad).norm() / hidden.grad.norm())


@pytest.mark.slow
def test_two_groups_of_two_are_two_models() -> None:
    for fields, gradient in run_ranks(4, two_groups):
        assert fields < 2e-5
        assert gradient < 2e-5


def bad_input() -> list[str]:
    """What each mistake says on this rank; a call that is right comes out after it."""
    hidden, group, said = torch.randn(3, 8), dist.group.WORLD, []
    weight, target = torch.randn(5 + dist.get_rank(), 8), torch.tensor([0, 10, 3])
    empty = weight[:0] if dist.get_rank() == 1 else weight
    wrong = [
        (hidden, weight, torch.tensor([0, 11, 3])),
        (hidden, empty, target),
        (hidden.double(), weight.double(), target),
    ]
    for arguments in wrong:
        try:
            linear_logprob(*arguments, tp_group=group)
        except (IndexError, ValueError, TypeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        assert linear_logprob(hidden, weight, target, tp_group=group).logprob.isfinite().all()
    return said


def test_a_mistake_is_an_error_on_every_rank_and_leaves_none_waiting() -> None:
    for said in run_ranks(2, bad_input):
        assert said == [
            "IndexError: target holds 11; it must lie in [0, 11) or equal ignore_index",
            "ValueError: weight has no rows on rank 1 of tp_group; every rank must hold at least one token",
            "TypeError: hidden is float64; with tp_group it must be float32, bfloat16 or float16",
        ]


def trained_head() -> tuple[list[float], list[float]]:
    """Losses of a head that learns, on its own and as shards, by SGD; hidden states come from a replicated layer."""
    torch.manual_seed(1)
    start, first = torch.randn(301, 12) / 4, torch.randn(12, 12) / 4
    x, target = torch.randn(40, 12), torch.randint(301, (40,))
    target[::7] = -100
    curves = []
    for group, rows in ((None, slice(None)), (dist.group.WORLD, shard_of(301, "uneven"))):
        head, layer = start[rows].clone().requires_grad_(), first.clone().requires_grad_()
        optimizer = torch.optim.SGD([head, layer], lr=0.5)
        curve = []
        for _ in range(20):
            loss = -linear_logprob(x @ layer, head, target, tp_group=group).logprob.sum() / 40
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    return curves[0], curves[1]


def test_a_head_in_shards_learns_as_the_whole_one() -> None:
    for whole, shards in run_ranks(2, trained_head):
        assert whole[-1] < whole[0] - 0.5
        assert max(abs(a - b) for a, b in zip(whole, shards)) < 1e-5


def whitened() -> list[float]:
    """Largest differences from one process: shares that are uneven, the last rank's empty; and one with nothing."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, mask = torch.randn(3 * world, 50) * 4 + 7, torch.rand(3 * world, 50) < 0.6
    ends = [3 * world * r * (r + 1) // (world * (world - 1)) for r in range(world)]  # the last rank has no row
    mine = slice(ends[rank], ends[rank + 1] if rank + 1 < world else ends[rank])
    found = []
    for shift in (True, False):
        got = masked_whiten(x[mine], mask[mine], shift_mean=shift, group=dist.group.WORLD)
        whole = masked_whiten(x, mask, shift_mean=shift)[mine]
        found.append(float((got - whole).abs().max()) if got.numel() else 0.0)
    nothing = masked_whiten(x[mine], torch.zeros_like(mask[mine]), group=dist.group.WORLD)
    return [*found, float(nothing.abs().sum())]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_group_whitens_as_one_process(world: int) -> None:
    for shifted, unshifted, nothing in run_ranks(world, whitened):
        assert max(shifted, unshifted) < 2e-6
        assert nothing == 0


def test_the_definition_alone_serves_shards_too() -> None:
    rows = [{**ROWS[0], "dtype": F32, "rows": 7, "ignored": (0, 3, 5)}]
    for found in run_ranks(2, with_backend, "naive", rows):
        assert max(error for errors in found for error in errors.values()) < 1e-4


def with_backend(name: str, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    os.environ["RLHF_KERNELS_BACKEND"] = name
    return differences(rows)
