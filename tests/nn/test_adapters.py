"""Adapters on transformers' models: where they sit, how they start, and that a routing survives checkpointing."""

import pytest
import torch
from architectures import CONFIGS, build
from torch import nn

from rlhf_kernels.nn import LoRALinear, LoraSpec, attach_adapters
from rlhf_kernels.nn.lora import checkpoint_layers, lora_layers
from rlhf_kernels.ops.lora import Routing, build_routing


@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_is_every_linear_of_the_decoder_layers_and_never_the_head(name):
    model = build(name)
    head = model.get_output_embeddings()
    attach_adapters(model, {"actor": LoraSpec(r=2)})
    inside = [m for m in model.modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    assert inside == [head]
    per_layer = {"gpt2": 4, "gpt-neox": 4}.get(name, 7)
    assert len(lora_layers(model)) == 2 * per_layer


@pytest.mark.parametrize("name", CONFIGS)
def test_attaching_adapters_changes_neither_the_logits_nor_the_names_of_the_weights(name):
    model, plain, ids = build(name), build(name), torch.arange(9)[None]
    routes = attach_adapters(model, {"actor": LoraSpec(r=2), "critic": LoraSpec(r=3)})
    logits = model(ids).logits
    torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    with routes.use(Routing.from_runs([(0, 4, 0), (4, 9, -1)], 2)):
        assert torch.equal(model(ids, use_cache=False).logits, logits)
    kept = {k for k in model.state_dict() if ".lora_A." not in k and ".lora_B." not in k}
    assert kept == set(plain.state_dict())


def test_adapters_start_as_peft_starts_them():
    model = build("llama")
    attach_adapters(model, {"actor": LoraSpec(r=3, alpha=6, dtype=torch.bfloat16)})
    for layer in lora_layers(model).values():
        a, b = layer.lora_A["actor"], layer.lora_B["actor"]
        assert a.shape == (3, layer.in_features)
        assert b.shape == (layer.out_features, 3)
        assert a.dtype == b.dtype == torch.bfloat16
        assert not b.any()
        assert 0 < a.abs().max() <= layer.in_features**-0.5 * 1.01


def test_target_modules_match_by_suffix():
    model = build("llama")
    attach_adapters(model, {"actor": LoraSpec(r=2, target_modules=("q_proj", "layers.1.mlp.up_proj"))})
    assert [p.removeprefix("model.") for p in lora_layers(model)] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize("target", ["lm_head", "no_such_proj", "embed_tokens"])
def test_a_target_that_is_no_linear_of_the_layers_is_an_error(target):
    with pytest.raises(ValueError, match=f"target_modules: '{target}'"):
        attach_adapters(build("llama"), {"actor": LoraSpec(target_modules=(target,))})


@pytest.mark.parametrize("bad", [{"r": 0}, {"r": 1.5}, {"alpha": float("nan")}], ids=str)
def test_a_bad_spec_is_an_error(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        LoraSpec(**bad)


def test_a_layer_that_an_adapter_does_not_target_bypasses_its_rows():
    model = build("llama")
    routes = attach_adapters(
        model, {"a": LoraSpec(r=2, target_modules="q_proj"), "b": LoraSpec(r=2, target_modules=("q_proj", "k_proj"))}
    )
    layer = lora_layers(model)["model.layers.0.self_attn.k_proj"]
    nn.init.normal_(layer.lora_B["b"])
    x = torch.randn(1, 6, 48)
    with routes.use(Routing.from_runs([(0, 3, 0), (3, 6, 1)], adapters=2)):
        y = layer(x)
    assert torch.equal(y[:, :3], layer(x)[:, :3])
    assert not torch.equal(y[:, 3:], layer(x)[:, 3:])


def test_the_routing_is_restored_after_an_exception():
    routes = attach_adapters(build("llama"), {"actor": LoraSpec(r=2)})
    with pytest.raises(RuntimeError, match="boom"), routes.use(Routing(1, 4, runs=(0, 4, 0))):
        raise RuntimeError("boom")
    assert routes.current is None


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpointed_layer_keeps_the_routing_of_its_own_forward(use_reentrant):
    """Forward through adapter a, forward through adapter b, then backward of the first: a's gradients, not b's."""
    model = build("llama").requires_grad_(False)
    routes = attach_adapters(model, {"a": LoraSpec(r=2), "b": LoraSpec(r=2)})
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    for p in layer.lora_B.values():
        nn.init.normal_(p)
    x = torch.randn(5, 48, requires_grad=True)

    def forward(slot, checkpointed):
        with routes.use(Routing.from_runs([(0, 5, slot)], adapters=2)):
            if checkpointed:
                return routes.checkpoint(layer, x, use_reentrant=use_reentrant)
            return layer(x)

    def gradients(checkpointed):
        model.zero_grad()
        first = forward(0, checkpointed)
        forward(1, checkpointed)
        first.sum().backward()
        return layer.lora_A["a"].grad, layer.lora_B["a"].grad, layer.lora_A["b"].grad

    want, got = gradients(False), gradients(True)
    assert want[0].any()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[2] is None


def test_a_checkpointed_layer_does_not_see_its_index_overwritten():
    model = build("llama").requires_grad_(False)
    routes = attach_adapters(model, {"a": LoraSpec(r=2), "b": LoraSpec(r=2)})
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    for p in layer.lora_B.values():
        nn.init.normal_(p)
    x = torch.randn(24, 48, requires_grad=True)
    scattered = torch.arange(24) % 3 - 1

    def gradient(checkpointed):
        index = scattered.clone()
        with routes.use(build_routing(index, 2)):
            y = routes.checkpoint(layer, x) if checkpointed else layer(x)
        index.copy_(scattered.flip(0))
        return torch.autograd.grad(y.square().sum(), [x, *layer.lora_A.values()])

    assert all(map(torch.equal, gradient(True), gradient(False)))


def test_checkpointing_that_loses_the_routing_is_an_error_and_not_zeros():
    model = build("llama").requires_grad_(False)
    routes = attach_adapters(model, {"a": LoraSpec(r=2)})
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, 48, requires_grad=True)
    with routes.use(Routing.from_runs([(0, 5, 0)], adapters=1)):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        y.sum().backward()


def test_checkpointing_leaves_dropout_off():
    model = build("gpt2")
    assert model.config.resid_pdrop > 0
    routes = attach_adapters(model, {"a": LoraSpec(r=2)})
    ids = torch.arange(9)[None]
    want = model(ids, use_cache=False).logits
    checkpoint_layers(model, routes)
    assert sum(m.training for m in model.modules() if type(m).__name__ == "GPT2Block") == 2
    with routes.use(Routing.from_runs([(0, 9, 0)], adapters=1)):
        assert torch.equal(model(ids, use_cache=False).logits, want)


def test_rows_that_do_not_fit_the_routing_are_an_error():
    model = build("llama")
    routes = attach_adapters(model, {"a": LoraSpec(r=2)})
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    with routes.use(Routing.from_runs([(0, 5, 0)], adapters=1)), pytest.raises(ValueError, match="routed for 5"):
        layer(torch.randn(6, 48))
