"""verl's names and shapes on `linear_logprob`. verl itself needs a GPU; stand-ins hold its modules' places."""

import sys
from types import ModuleType

import pytest
import torch

from rlhf_kernels.integrations.verl import PLACES, FusedLinearForPPO, linear_cross_entropy, patch


def inputs(*shape):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*shape, 24, requires_grad=True), torch.randn(67, 24, requires_grad=True)
    return hidden, weight, torch.randint(67, shape)


def expected(hidden, weight, labels, temperature):
    logits = hidden @ weight.t() / temperature
    p = logits.log_softmax(-1)
    return p.gather(-1, labels[..., None])[..., 0], -(p.exp() * p).sum(-1)


@pytest.mark.parametrize("shape", [(13,), (2, 7)], ids=["rows", "a batch"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_their_gradients_are_those_of_the_logits(shape, temperature):
    hidden, weight, labels = inputs(*shape)
    up, down = torch.randn(*shape), torch.randn(*shape)
    found = []
    for head in (linear_cross_entropy, FusedLinearForPPO(chunk_size=4), expected):
        logprobs, entropy = head(hidden, weight, labels, temperature)
        assert logprobs.shape == entropy.shape == shape
        grads = torch.autograd.grad((up * logprobs + down * entropy).sum(), (hidden, weight))
        found.append([logprobs, entropy, *grads])
    for mine in found[:2]:
        for got, want in zip(mine, found[2]):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_reductions_are_of_logprobs_and_count_what_is_not_ignored():
    hidden, weight, labels = inputs(9)
    labels[4] = -100
    each, entropy = linear_cross_entropy(hidden, weight, labels)
    assert each[4] == 0
    for reduction, want in (("sum", each.sum()), ("mean", each.sum() / 8)):
        got, whole = linear_cross_entropy(hidden, weight, labels, 1.0, reduction)
        torch.testing.assert_close(got, want)
        assert torch.equal(whole, entropy)
    with pytest.raises(ValueError, match="reduction is 'batch'"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "batch")


def test_patch_takes_verls_places_and_gives_them_back(monkeypatch):
    for path, name in PLACES.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        setattr(sys.modules[path], name, name)
    undo = patch()
    assert sys.modules["verl.utils.kernel.linear_cross_entropy"].linear_cross_entropy is linear_cross_entropy
    assert sys.modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO is FusedLinearForPPO
    undo()
    assert all(getattr(sys.modules[path], name) == name for path, name in PLACES.items())


def test_patch_without_verl_says_so():
    with pytest.raises(ImportError, match="verl"):
        patch()
