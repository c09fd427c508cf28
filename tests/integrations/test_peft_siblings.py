"""Projections that read one tensor are one op on an accelerated PEFT model too, and nothing else changes."""

import pytest
import torch
from peft_models import both, run, same, theirs, train_all, two

from rlhf_kernels.integrations.peft import accelerate


@pytest.fixture
def ops(monkeypatch):
    """How many projections each call of the op computed."""
    from rlhf_kernels.integrations import peft_layers

    widths, apply = [], peft_layers.apply

    def counted(x, weights, *args, **kwargs):
        widths.append(len(weights))
        return apply(x, weights, *args, **kwargs)

    monkeypatch.setattr(peft_layers, "apply", counted)
    return widths


def test_projections_of_one_tensor_are_one_op(ops):
    own, mine = two(), accelerate(two())
    train_all(own, mine)
    run(mine)
    assert ops == [3, 1, 2, 1] * 2
    ops.clear()
    fused = run(mine, adapter_names=["critic", "actor", "__base__", "actor"])
    assert ops == [3, 1, 2, 1] * 2
    ops.clear()
    same(run(accelerate(mine, fuse=False), adapter_names=["critic", "actor", "__base__", "actor"]), fused)
    assert ops == [1] * 14
    ops.clear()
    accelerate(mine)
    with mine.disable_adapter():
        run(mine)
    assert ops == [3, 1, 2, 1] * 2


def test_projections_that_are_not_alike_are_apart(ops):
    own, mine = both("llama", {"actor": {"alpha_pattern": {"k_proj": 3}}, "critic": {"target_modules": ["v_proj"]}})
    same(run(mine), run(own))
    assert ops == [2, 1, 1, 2, 1] * 2  # q with v, then k
    for model in (own, mine):
        model.base_model.set_adapter(["actor", "critic"])
    ops.clear()
    same(run(mine), run(own))
    assert ops == [1, 1, 1, 1, 2, 1] * 2
    for model in (own, mine):
        model.base_model.set_adapter("critic")
    same(run(mine), run(own))


def test_an_adapter_that_the_first_projection_lacks_keeps_its_scalings_on_the_others(ops):
    critic = {"target_modules": ["k_proj", "v_proj"], "alpha_pattern": {"v_proj": 24}}
    own, mine = (theirs("llama", {"actor": {}, "critic": critic}) for _ in range(2))
    accelerate(mine)
    train_all(own, mine)
    names = ["critic", "actor", "__base__", "critic"]
    same(run(mine.eval(), adapter_names=names), run(own.eval(), adapter_names=names))


@pytest.mark.parametrize("change", ["scaling", "adapter", "disabled"])
def test_what_changes_between_two_projections_is_seen(change):
    own, mine = both("llama", {"actor": {}, "critic": {}})
    x, results = torch.randn(3, 48), []
    for model in (own, mine):
        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        q = attention.q_proj(x)
        if change == "scaling":
            attention.k_proj.scale_layer(2.0)
        elif change == "adapter":
            model.set_adapter("critic")
        else:
            model.base_model.disable_adapter_layers()
        results.append([q, attention.k_proj(x), attention.v_proj(x)])
    for y, expected in zip(results[1], results[0]):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_projections_that_read_other_tensors_are_computed_alone_from_then_on(ops):
    """Cross-attention: k and v read the encoder's states."""
    own, mine = both()
    x, states, results = torch.randn(3, 48), torch.randn(5, 48), []
    for model in (own, mine):
        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        for _ in range(2):
            results.append([attention.q_proj(x), attention.k_proj(states), attention.v_proj(states)])
    assert ops == [3, 1, 1, 1, 1, 1]  # q with k and v in vain, then each alone
    for y, expected in zip(results[3], results[0]):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
