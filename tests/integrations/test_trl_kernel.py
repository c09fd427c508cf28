"""The kernel under TRL's fused head gives what TRL's gives: every output and gradient, of every head's shape."""

import math

import pytest
import torch
import transformers
from architectures import GATED, SIZES, build
from torch import nn
from trl_trainers import random_ids, scored

from rlhf_kernels.integrations.trl import patch, patched, patching, unpatch
from rlhf_kernels.integrations.trl_kernel import Kernel
from rlhf_kernels.integrations.trl_metrics import FIRST_COLUMNS

trl = pytest.importorskip("trl")
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

EVERYTHING = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def with_head(name="llama", outputs=EVERYTHING, temperature=0.7, **options):
    model = build(name)
    add_fused_lm_head(model, temperature=temperature, outputs=outputs, **options)
    return model


def close(found, expected, **tolerance):
    for name in (*EVERYTHING, "loss", "label_mask"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **tolerance, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt-neox", "granite", "cohere"])
def test_outputs_and_gradients_are_trl_s(name):
    ids, labels = random_ids()
    weights = {key: torch.randn(3, 8) for key in ("log_probs", "entropy")}
    model = with_head(name)
    expected, gradients = scored(model, ids, labels, weights)
    found, own = scored(patch(model), ids, labels, weights)
    close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == gradients.keys()
    for path, gradient in own.items():
        torch.testing.assert_close(gradient, gradients[path], rtol=1e-3, atol=1e-5, msg=path)


def test_the_auxiliary_loss_of_experts_stays_trl_s():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, **GATED, num_local_experts=4, num_experts_per_tok=2)
    )
    add_fused_lm_head(model, outputs=EVERYTHING)
    ids, labels = random_ids()
    given = {"input_ids": ids, "labels": labels, "output_router_logits": True, "fused_lm_head": True}
    expected = model(**given)
    found = patch(model)(**given)
    close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.aux_loss, expected.aux_loss)


@pytest.mark.slow
def test_under_torch_compile_the_numbers_are_the_same():
    ids, labels = random_ids()
    model = with_head()
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
    compiled = torch.compile(patch(model), backend="aot_eager")
    found = compiled(input_ids=ids, labels=labels, fused_lm_head=True)
    close(found, expected, rtol=1e-4, atol=1e-5)
    found.loss.backward()


def test_a_batch_without_labels_is_a_zero_that_can_be_differentiated():
    ids, labels = random_ids()
    model = patch(with_head())
    out, gradients = scored(model, ids, torch.full_like(labels, -100), {"log_probs": torch.ones(3, 8)})
    assert float(out.loss.detach()) == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_shifted_labels_and_counts_of_the_whole_batch_are_trl_s():
    ids, labels = random_ids()
    model = with_head()
    given = {"input_ids": ids, "shift_labels": labels, "num_items_in_batch": 40, "fused_lm_head": True}
    expected = model(**given)
    close(patch(model)(**given), expected, rtol=1e-4, atol=1e-5)


def test_without_the_fused_head_the_forward_is_the_model_s_own():
    ids, labels = random_ids()
    model = with_head()
    expected = model(input_ids=ids, labels=labels)
    found = patch(model)(input_ids=ids, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_under_autocast_the_head_runs_in_its_dtype():
    ids, labels = random_ids()
    model = with_head()
    exact = model(input_ids=ids, labels=labels, fused_lm_head=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
        found = patch(model)(input_ids=ids, labels=labels, fused_lm_head=True)
    assert found.log_probs.dtype == torch.float32
    assert (found.log_probs - exact.log_probs).abs().max() <= (expected.log_probs - exact.log_probs).abs().max() + 0.01


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_most_likely_token_is_found_wherever_it_stands(softcap):
    """Rows from flat to sharp, over more columns than the first block, against argmax."""
    vocabulary, width = 3 * FIRST_COLUMNS + 7, 16
    weight, bias = torch.randn(vocabulary, width), torch.randn(vocabulary)
    hidden = torch.randn(600, width) * torch.logspace(-3, 1, 600)[:, None]
    logits = hidden @ weight.t() + bias
    best = logits.argmax(1)
    target = torch.where(torch.rand(600) < 0.5, best, torch.randint(vocabulary, (600,)))
    outputs = Kernel(False).apply(hidden, weight, bias, target, 1.0, 0, softcap, 1.0, EVERYTHING)
    assert torch.equal(outputs[4], best == target)
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(outputs[3], z.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], z.softmax(1).square().sum(1).log(), rtol=1e-4, atol=1e-4)


def test_of_equal_logits_the_first_is_the_most_likely():
    weight = torch.zeros(900, 4)
    target = torch.tensor([0, 1, 899])
    assert Kernel(False).apply(torch.randn(3, 4), weight, None, target, 1.0, 0, None, 1.0, EVERYTHING)[4].tolist() == [
        True, False, False,
    ]  # fmt: skip


def test_entropies_carry_a_gradient_only_where_it_is_wanted():
    ids, labels = random_ids()
    model = with_head()
    for wanted in (True, False):
        with patching(model, entropy_grad=wanted):
            assert model(input_ids=ids, labels=labels, fused_lm_head=True).entropy.requires_grad == wanted
    with patching(model):
        assert model(input_ids=ids, labels=labels, fused_lm_head=True).entropy.requires_grad


def test_a_frozen_head_saves_no_logits_and_costs_two_products():
    """Its backward is elementwise: what the forward saved is [rows, H]."""
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(2000, 16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        Kernel(False).apply(hidden, weight, None, torch.arange(50), 1.0, 0, None, 1.0, ("log_probs", "entropy"))
    assert max(saved) == hidden.numel()


def test_patching_is_undone_to_the_object_that_was_there():
    model = with_head()
    before = model.__dict__["forward"]
    patch(patch(model))
    assert patched(model) == {"model": None}
    unpatch(unpatch(model))
    assert model.__dict__["forward"] == before
    assert patched(model) == {"model": "patch was not called"}


def test_an_exception_inside_the_context_undoes_the_patch_too():
    model = with_head()
    with pytest.raises(KeyError), patching(model):
        raise KeyError
    assert patched(model) == {"model": "patch was not called"}


def test_a_layer_that_something_was_wrapped_around_is_switched_off_and_on(monkeypatch):
    ids, labels = random_ids()
    model = patch(with_head())
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    monkeypatch.setattr(ChunkedLogProbFunction, "forward", staticmethod(lambda *_: 1 / 0))
    unpatch(model)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids, labels=labels, fused_lm_head=True)
    patch(model)
    assert math.isfinite(model(input_ids=ids, labels=labels, fused_lm_head=True).loss.detach())


@pytest.mark.parametrize("target", [build("llama"), nn.Linear(2, 2)], ids=["without TRL's head", "no language model"])
def test_a_model_without_trl_s_head_is_one_clear_error(target):
    with pytest.raises(ValueError, match="no model of it has TRL's fused head"):
        patch(target)


def test_what_is_no_module_is_one_clear_error():
    with pytest.raises(TypeError, match="target is a str; it must be a trainer or a module"):
        patch("trainer")


def test_another_version_of_trl_is_one_clear_error_and_nothing_changes(monkeypatch):
    model = with_head()
    before = model.__dict__["forward"]
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ValueError, match=r"TRL 1\.17\.0 is installed; this integration is written for 1\.16\.0"):
        patch(model)
    assert model.__dict__["forward"] == before
