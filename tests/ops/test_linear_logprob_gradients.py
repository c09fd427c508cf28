"""linear_logprob's derivatives: gradcheck of every output, one upstream gradient apart from the others, adapters that
no row uses, and what is an error."""

import pytest
import torch
from head_cases import ALL_DIVERGENCES, BF16, DISTRIBUTION_FIELDS, EVERY_FIELD, F32, Case, drawn
from torch import Tensor

from rlhf_kernels.ops.logprob import linear_logprob, naive

pytestmark = pytest.mark.usefixtures("device")

LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
SHAPES = {"hidden": (4, 3), "weight": (6, 3), "bias": (6,), "lora_a": (2, 2, 3), "lora_b": (2, 6, 2)}


def exact_field(field: str, x: dict[str, Tensor], reference: Tensor, ref_weight: Tensor, bias_there: Tensor) -> Tensor:
    """A field in float64 of leaves x. The reference is a constant of the op, so its logits are kept from moving with
    the leaves: it has a weight of its own, and one more coordinate takes back what the bias adds to it."""
    taken_back = bias_there - x["bias"].detach()
    out = naive.linear_logprob(
        torch.cat([x["hidden"], torch.zeros(4, 1, dtype=torch.float64)], 1),
        torch.cat([x["weight"], torch.zeros(6, 1, dtype=torch.float64)], 1),
        torch.tensor([0, 5, -100, 2]),
        bias=x["bias"],
        temperature=torch.tensor([0.7, 1.0, 1.0, 1.9]),
        softcap=2.0,
        logit_scale=1.3,
        entropy=True,
        ref_hidden=torch.cat([reference, torch.ones(4, 1, dtype=torch.float64)], 1),
        ref_weight=torch.cat([ref_weight, taken_back[:, None]], 1),
        divergence=ALL_DIVERGENCES,
        lora=(
            torch.cat([x["lora_a"], torch.zeros(2, 2, 1, dtype=torch.float64)], 2), x["lora_b"],
            torch.tensor([0, 1, 1, -1]), torch.tensor([0.5, 2.0]),
        ),
        grad_fields=None,
    )  # fmt: skip
    return getattr(out, field)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("field", EVERY_FIELD)
def test_gradcheck_in_float64(field, leaf):
    x = {name: drawn(*shape, seed=i).double() for i, (name, shape) in enumerate(SHAPES.items())}
    reference, ref_weight, bias = drawn(4, 3, seed=8).double(), drawn(6, 3, seed=9).double(), x["bias"].clone()

    def function(value: Tensor) -> Tensor:
        return exact_field(field, {**x, leaf: value}, reference, ref_weight, bias)

    assert torch.autograd.gradcheck(function, x[leaf].requires_grad_())


@pytest.mark.parametrize("field", EVERY_FIELD)
def test_float64_inputs_have_the_gradients_of_the_definition(field):
    case = Case(rows=5, vocabulary=40, grads=(field,), train=True, lora=True, bias=True, softcap=3.0)
    _, ours = case.run(linear_logprob, lambda x: x.double())
    _, exact = case.run(naive.linear_logprob, lambda x: x.double())
    for name, grad in ours.items():
        assert torch.allclose(grad, exact[name], rtol=1e-6, atol=1e-12), name


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("field", EVERY_FIELD)
def test_gradients_predict_the_change_of_the_float64_value(field, dtype):
    """No autograd on the other side: a central difference of the definition along a random direction of hidden."""
    case = Case(dtype, rows=70, vocabulary=700, sharpness=1.0, noise=1.0, grads=(field,), softcap=6.0, ignored=(4,))
    _, grads = case.run(linear_logprob, lambda x: x)
    step, moved = drawn(*case.hidden.shape, seed=5).double(), []
    middle = case.hidden
    for sign in (1, -1):
        case.hidden = middle.double() + sign * 1e-5 * step
        out, _ = case.run(naive.linear_logprob, lambda x: x.double())
        moved.append((out[field] * case.upstream[field].double()).sum())
    slope = (moved[0] - moved[1]) / 2e-5
    predicted = (grads["hidden"].double() * step).sum()
    scale = (grads["hidden"].double() * step).norm()
    assert abs(predicted - slope) <= {F32: 1e-5, BF16: 1e-2}[dtype] * scale


@pytest.mark.parametrize("save", ["grad_vector", "recompute", "logits"])
@pytest.mark.parametrize("field", DISTRIBUTION_FIELDS)
def test_fields_without_an_upstream_gradient_or_with_zeros_take_no_part(field, save):
    """All fields may carry gradient; the loss uses one of them, or weighs the others with zeros."""
    case = Case(rows=9, vocabulary=300, grads=DISTRIBUTION_FIELDS, save=save)
    upstream = dict(case.upstream)
    case.upstream = {field: upstream[field]}
    _, absent = case.run(linear_logprob, lambda x: x)
    case.upstream = {name: g if name == field else torch.zeros_like(g) for name, g in upstream.items()}
    _, zeros = case.run(linear_logprob, lambda x: x)
    _, exact = case.run(naive.linear_logprob, lambda x: x.double())
    assert torch.allclose(absent["hidden"], zeros["hidden"], rtol=1e-5, atol=1e-8)
    assert (absent["hidden"] - exact["hidden"]).norm() <= 2e-5 * exact["hidden"].norm()


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("hidden_trains", [False, True])
def test_an_adapter_that_is_bypassed_by_an_int_gets_zero_gradients(hidden_trains, head_trains):
    a, b = drawn(2, 3, 16, seed=1).requires_grad_(), drawn(2, 50, 3, seed=2).requires_grad_()
    hidden, weight = (
        drawn(6, 16, seed=3).requires_grad_(hidden_trains),
        drawn(50, 16, seed=4).requires_grad_(head_trains),
    )
    out = linear_logprob(hidden, weight, torch.arange(6), lora=(a, b, -1, 2.0), entropy=True)
    bare = linear_logprob(hidden, weight, torch.arange(6), entropy=True)
    assert torch.equal(out.logprob, bare.logprob)
    assert not out.entropy.requires_grad
    out.logprob.sum().backward()
    assert a.grad.shape == a.shape
    assert b.grad.shape == b.shape
    assert not a.grad.any()
    assert not b.grad.any()
    assert (hidden.grad is not None) == hidden_trains
    with torch.no_grad():
        assert not linear_logprob(hidden, weight, torch.arange(6), lora=(a, b, -1, 2.0)).logprob.requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_poisoned_adapter_stays_in_its_rows(poison):
    case = Case(rows=12, vocabulary=300, lora=True, train=False, grads=("logprob", "entropy"), ignored=())
    clean, clean_grads = case.run(linear_logprob, lambda x: x)
    case.lora[1][0] = poison
    out, grads = case.run(linear_logprob, lambda x: x)
    others = case.lora[2] != 0
    assert (~others).any()
    assert torch.equal(out["logprob"][others], clean["logprob"][others])
    assert torch.equal(grads["hidden"][others], clean_grads["hidden"][others])
    assert not out["entropy"][~others].isfinite().any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("save", ["grad_vector", "recompute"])
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(save):
    hidden = torch.randn(4, 8, requires_grad=True)
    out = linear_logprob(hidden, torch.randn(10, 8), torch.arange(4), save=save)
    (grad,) = torch.autograd.grad(out.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), hidden)
