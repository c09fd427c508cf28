"""linear_logprob against its float64 definition: every field and gradient, what is ignored, detached or constant."""

import pytest
import torch
from head_cases import ALL_DIVERGENCES, BF16, DISTRIBUTION_FIELDS, F16, Case, as_exact_as_plain

from rlhf_kernels.ops.logprob import linear_logprob, native

pytestmark = pytest.mark.usefixtures("device")

QUICK = {
    "plain": {},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": F16},
    "one row": {"rows": 1, "ignored": ()},
    "tiny vocabulary": {"vocabulary": 123, "rows": 7},
    "softcap": {"softcap": 15.0, "dtype": BF16},
    "bias and temperature": {"bias": True, "temperature": 0.75, "logit_scale": 1.25},
    "per-row temperature, own reference": {"temperature": "per row", "own_reference": True, "dtype": BF16},
    "all-negative logits": {"shift": -40.0},
    "lora": {"lora": True, "dtype": BF16},
    "lora trained": {"lora": True, "train": True, "bias": True},
    "trained head": {"train": True, "softcap": 10.0, "bias": True, "dtype": BF16},
    "saved logits": {"train": True, "save": "logits", "temperature": 0.8, "softcap": 9.0, "grads": DISTRIBUTION_FIELDS},
    "every field": {"grads": (*DISTRIBUTION_FIELDS, "k1"), "lora": True, "train": True, "bias": True, "dtype": BF16},
    "every field as vectors": {"grads": DISTRIBUTION_FIELDS, "save": "grad_vector", "softcap": 9.0},
    "logprob recomputed": {"save": "recompute", "lora": True},
    "far reference": {"noise": 4.0, "grads": ("kl", "rkl", "js")},
    "near reference": {"noise": 1e-3, "grads": ("kl", "rkl", "js")},
    "zero upstream": {"upstream": "all zero", "grads": ("logprob", "kl")},
    **{f"only {name}": {"grads": (name,), "seed": i} for i, name in enumerate((*DISTRIBUTION_FIELDS, "k1", "k2"))},
}


@pytest.mark.parametrize("options", QUICK.values(), ids=QUICK.keys())
def test_values_and_gradients_follow_the_definition(options):
    as_exact_as_plain(**options)


@pytest.mark.parametrize("options", [QUICK[k] for k in ("softcap", "lora trained", "every field", "far reference")])
def test_the_pytorch_row_passes_agree_with_the_definition(options, monkeypatch):
    monkeypatch.setattr(native, "AVAILABLE", False)
    as_exact_as_plain(**options)


def test_ignored_rows_are_zero_everywhere_even_under_nan():
    case = Case(ignored=(0, 5, 32), grads=("logprob", "kl"))
    case.hidden[5] = float("nan")
    hidden = case.hidden.clone().requires_grad_()
    out = linear_logprob(
        hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES, entropy=True,
        grad_fields=("logprob", "kl"),
    )  # fmt: skip
    (out.logprob + out.kl).backward(torch.where(case.target == -100, float("nan"), 1.0))
    ignored = case.target == -100
    for name in out._fields:
        assert (getattr(out, name)[ignored] == 0).all(), name
        assert torch.isfinite(getattr(out, name)).all(), name
    assert (hidden.grad[ignored] == 0).all()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("rows", [0, 6], ids=["no rows", "all ignored"])
@pytest.mark.parametrize("save", ["auto", "grad_vector", "recompute", "logits"])
def test_no_row_to_work_on(rows, save):
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=save in ("recompute", "logits"))
    target = torch.full((rows,), -100)
    out = linear_logprob(
        hidden, weight, target, ref_hidden=hidden, divergence=ALL_DIVERGENCES, entropy=True, save=save,
        grad_fields=("logprob", "entropy", "js"),
    )  # fmt: skip
    (out.logprob + out.entropy + out.js).sum().backward()
    assert all(field.shape == (rows,) and not field.any() for field in out)
    assert not hidden.grad.any()


def test_leading_dimensions_strides_and_int32_targets_make_no_difference():
    x, w = torch.randn(2, 3, 5, 16), torch.randn(50, 32)[:, ::2]
    target = torch.randint(50, (2, 3, 5))
    flat = linear_logprob(x.reshape(30, 16), w.contiguous(), target.reshape(30), entropy=True)
    strided = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    shaped = linear_logprob(strided, w, target.to(torch.int32), entropy=True)
    assert shaped.logprob.shape == (2, 3, 5)
    assert torch.equal(flat.logprob, shaped.logprob.reshape(30))
    assert torch.equal(flat.entropy, shaped.entropy.reshape(30))


def test_fields_outside_grad_fields_are_detached():
    case = Case()
    hidden = case.hidden.requires_grad_()
    out = linear_logprob(
        hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES, entropy=True,
        grad_fields=("k3",),
    )  # fmt: skip
    assert [name for name in out._fields if getattr(out, name).requires_grad] == ["k3"]
    free = linear_logprob(hidden, case.weight, case.target, entropy=True, grad_fields=None)
    assert all(field.requires_grad for field in (free.entropy, free.lse, free.logprob))
    assert linear_logprob(hidden, case.weight, case.target).entropy is None


def test_the_reference_is_a_constant_even_where_every_field_carries_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    target = torch.arange(4)
    out = linear_logprob(hidden, weight, target, ref_hidden=hidden, divergence=("kl",), grad_fields=None)
    assert out.kl.requires_grad
    assert not out.ref_logprob.requires_grad


def test_autocast_changes_nothing():
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    lora = (torch.randn(3, 16), torch.randn(50, 3), None, 0.5)
    found = []
    for enabled in (False, True):
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=enabled):
            out = linear_logprob(hidden, weight, torch.arange(6), lora=lora, entropy=True, grad_fields=None)
        found.append((out.logprob, *torch.autograd.grad((out.logprob + out.entropy).sum(), (hidden, weight))))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found))


@pytest.mark.usefixtures("kernels")
def test_autocast_does_not_reach_into_a_backward_under_it():
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=enabled):
            out = linear_logprob(hidden, weight, torch.arange(6))
            found.append(torch.autograd.grad(out.logprob.sum(), (hidden, weight)))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found))
