"""An accelerated PEFT model computes what PEFT computes."""

import copy

import pytest
import torch
from architectures import build
from peft_models import IDS, TARGETS, both, distance, run, same, theirs, two

from rlhf_kernels.integrations.peft import accelerate, accelerated, route


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 7, "c_fc": 2}, "alpha_pattern": {"q_proj": 3}}],
    ids=["plain", "rslora", "patterns"],
)
def test_one_adapter_gives_pefts_logits_and_gradients(name, options):
    own, mine = both(name, **options)
    expected = run(own)
    same(run(mine), expected)
    assert len(expected[1]) == 2 * len(accelerated(mine))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("scale", [False, True], ids=["one scaling", "two scalings"])
def test_several_active_adapters_add_up_and_each_has_its_gradient(name, scale):
    adapters = {"actor": {"r": 4}, "critic": {"r": 3, "lora_alpha": 6 if scale else 4.5}}
    own, mine = both(name, adapters)
    for model in (own, mine):
        model.base_model.set_adapter(["actor", "critic"])
    expected = run(own)
    same(run(mine), expected)
    assert len(expected[1]) == 4 * len(accelerated(mine))


def test_scale_changes_are_seen():
    own, mine = both("llama", {"actor": {}, "critic": {}})
    for model in (own, mine):
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("actor", 2.5)
                module.scale_layer(0.5)
    same(run(mine), run(own))
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(own, 0.1), rescale_adapter_scale(mine, 0.1):
        same(run(mine), run(own))


def test_a_trained_base_has_its_gradients():
    own, mine = both("gpt2")
    for model in (own, mine):
        model.requires_grad_(True)
    same(run(mine), run(own))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_disabled_adapters_are_the_base(name):
    own, mine = both(name)
    base = build(name)(input_ids=IDS).logits
    with mine.disable_adapter():
        assert distance(mine(input_ids=IDS).logits, base) < 3e-6
    same(run(mine), run(own))  # and they are back
    for model in (own, mine):
        model.base_model.disable_adapter_layers()
    assert distance(mine(input_ids=IDS).logits, base) < 3e-6
    for model in (own, mine):
        model.base_model.enable_adapter_layers()
    same(run(mine), run(own))


def test_an_untrained_adapter_is_bit_equal_to_disabled_ones():
    mine = accelerate(theirs())
    for path, parameter in mine.named_parameters():
        if "lora_B" in path:
            parameter.data.zero_()
    trained = mine(input_ids=IDS).logits
    with mine.disable_adapter():
        assert torch.equal(mine(input_ids=IDS).logits, trained)


@torch.no_grad()
def test_merged_adapters_are_in_the_weights_and_come_out_again():
    own, mine = both("gpt2", {"actor": {}, "critic": {}})
    before = mine(input_ids=IDS).logits
    for model in (own, mine):
        model.merge_adapter(["critic"])
    torch.testing.assert_close(mine(input_ids=IDS).logits, own(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merged"):
        mine(input_ids=IDS, adapter_names=["actor"] * 4)
    with pytest.raises(ValueError, match="merged"), route(mine, torch.zeros(4, dtype=torch.long), ["actor"]):
        mine(input_ids=IDS)
    for model in (own, mine):
        model.unmerge_adapter()
    torch.testing.assert_close(mine(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
    mine.merge_adapter(["critic"])
    with mine.disable_adapter():  # which unmerges, in PEFT
        torch.testing.assert_close(mine(input_ids=IDS).logits, build("gpt2")(input_ids=IDS).logits)
    torch.testing.assert_close(
        mine.merge_and_unload()(input_ids=IDS).logits, own.merge_and_unload()(input_ids=IDS).logits,
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_dropout_in_training_is_pefts_and_draws_the_same():
    own, mine = both("llama", lora_dropout=0.3)
    outputs = []
    for model in (own, mine):
        torch.manual_seed(7)
        outputs.append(run(model))
    assert torch.equal(outputs[0][0], outputs[1][0])
    same(outputs[1], outputs[0])
    same(run(mine.eval()), run(own.eval()))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["fp32 adapters", "bf16 adapters"])
def test_bf16_is_as_near_to_the_truth_as_pefts_own_in_bf16(adapter_dtype):
    """fp32 adapters are cast down on use (PEFT casts x up instead), so that the measure is PEFT with bf16 adapters."""
    own, mine = both("llama", dtype=torch.bfloat16)
    path = "base_model.model.model.layers.1.mlp.down_proj"
    own, mine = (cast_adapters(m.get_submodule(path), adapter_dtype) for m in (own, mine))
    x = torch.randn(24, 80).bfloat16()
    weight = torch.randn(24, 48).bfloat16()
    truth, plain, ours = (
        layer_run(layer, x.to(layer.base_layer.weight.dtype), weight)
        for layer in (copy.deepcopy(own).double(), cast_adapters(copy.deepcopy(own), torch.bfloat16), mine)
    )
    assert [t.dtype for t in ours] == [torch.bfloat16] * 2 + [adapter_dtype] * 2
    for factor, want, their, our in zip((2, 3, 3, 3), truth, plain, ours):
        error, bound = ((t.double() - want).abs().max() for t in (our, their))
        assert error <= factor * bound
        assert (our.double() - want).norm() <= 1e-2 * want.norm()


def cast_adapters(layer, dtype):
    for path, parameter in layer.named_parameters():
        if "lora_" in path:
            parameter.data = parameter.data.to(dtype)
    return layer


def layer_run(layer, x, weight):
    """The output and the gradients of the input, A and B."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(weight.to(y.dtype))
    return [y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_pefts_dtypes(dtype):
    own, mine = both("llama", dtype=dtype)
    layers = [m.get_submodule("base_model.model.model.layers.1.mlp.down_proj") for m in (own, mine)]
    for x in (torch.randn(2, 5, 80), torch.randn(2, 5, 80).bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, y = (layer(x) for layer in layers)
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (3, 48), (2, 3, 4, 48)], ids=str)
def test_inputs_of_any_shape(shape):
    own, mine = both()
    x = torch.randn(shape)
    their, our = (m.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(x) for m in (own, mine))
    torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_an_input_of_the_wrong_dtype_is_pefts_error():
    _, mine = both()
    with pytest.raises(RuntimeError, match="dtype"):
        mine.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(torch.randn(2, 48).double())


@torch.no_grad()
def test_hooks_on_a_part_are_run():
    _, mine = both()
    layer = mine.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x, seen = torch.randn(2, 48), []
    y = layer(x)
    for part in (layer.base_layer, layer.lora_A["default"]):
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)
        handle.remove()
    assert len(seen) == 2


def test_training_steps_are_those_of_pefts_model():
    """As a trainer runs it: AdamW on what requires gradients, loss by labels."""
    models = both("qwen2", lora_alpha=16)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][-1] < 0.95 * losses[0][0]


@torch.no_grad()
def test_generation_is_pefts():
    own, mine = both()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = own.eval().generate(IDS, **options)
    assert torch.equal(mine.eval().generate(IDS, **options), expected)
    assert expected.shape == (4, 14)


@torch.no_grad()
def test_generation_with_beams_and_an_adapter_a_sample():
    own, mine = two().eval(), accelerate(two()).eval()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    names = ["actor", "critic", "__base__", "critic"]
    assert torch.equal(
        mine.generate(IDS, adapter_names=names, **options), own.generate(IDS, adapter_names=names, **options)
    )
