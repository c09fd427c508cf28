"""An accelerated PEFT model computes what PEFT computes, in everything PEFT does, and then some: mixed training."""

import contextlib
import copy
import pickle

import pytest
import torch
from architectures import build
from torch import nn

peft = pytest.importorskip("peft")

from rlhf_kernels.integrations.peft import accelerate, accelerated, restore, route  # noqa: E402
from rlhf_kernels.ops.lora import Routing  # noqa: E402

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
IDS = torch.arange(3, 27).view(4, 6) % 131


def config(name="llama", **options):
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def stir(model):
    """No adapter is the base any more, and no dropout but an adapter's makes a difference."""
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if "lora_A" in path or "lora_B" in path:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_" not in path:
            module.p = 0.0
    return model


def theirs(name="llama", adapters=None, dtype=torch.float32, **options):
    """A PEFT model of its own adapters, in training mode. The same call gives the same bits."""
    adapters = {"default": {}} if adapters is None else adapters
    model = None
    for adapter, more in adapters.items():
        if model is None:
            model = peft.get_peft_model(build(name, dtype), config(name, **options | more), adapter)
        else:
            model.add_adapter(adapter, config(name, **options | more))
    return stir(model).train()


def two(name="llama", **options):
    return theirs(name, {"actor": {"r": 4}, "critic": {"r": 3, "use_rslora": True}}, **options)


def both(*args, **kwargs):
    """The model of PEFT and the same, accelerated."""
    pair = theirs(*args, **kwargs), accelerate(theirs(*args, **kwargs))
    assert not any(accelerated(pair[1]).values())
    return pair


def train_all(*models):
    for model in models:
        for path, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in path)


def run(model, weight=None, **inputs):
    """Logits and the gradients of every parameter that requires one."""
    logits = model(input_ids=IDS, **inputs).logits
    weight = torch.linspace(-1, 1, logits.numel()).view_as(logits) if weight is None else weight
    (logits * weight.to(logits.dtype)).sum().backward()
    return logits.detach(), grads(model)


def grads(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.count_nonzero())}
    model.zero_grad()
    return found


def same(mine, peft_own, names=True):
    torch.testing.assert_close(mine[0], peft_own[0], rtol=1e-5, atol=5e-6)
    assert mine[1].keys() == peft_own[1].keys()
    for name, grad in peft_own[1].items():
        bound = 1e-5 * float(grad.abs().max())
        torch.testing.assert_close(mine[1][name], grad, rtol=1e-5, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


# ---- what PEFT computes ----------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(mine(input_ids=IDS).logits, base, rtol=1e-6, atol=1e-6)
    same(run(mine), run(own))  # and they are back
    for model in (own, mine):
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(mine(input_ids=IDS).logits, base, rtol=1e-6, atol=1e-6)
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


# ---- rows with adapters of their own ---------------------------------------------------------------------------------

MIXED = [
    ["actor", "actor", "critic", "critic"],
    ["critic", "__base__", "actor", "critic"],
    ["__base__"] * 4,
    ["actor"] * 4,
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("names", MIXED, ids=" ".join)
def test_adapter_names_give_pefts_logits_in_eval(name, names):
    own, mine = two(name).eval(), accelerate(two(name)).eval()
    train_all(own, mine)
    same(
        run_any(mine, names),
        run_any(own, names),
    )


def run_any(model, names):
    logits = model(input_ids=IDS, adapter_names=names).logits
    if logits.requires_grad:
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), grads(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("names", MIXED[:2], ids=" ".join)
def test_a_mixed_training_batch_is_its_parts_one_by_one(name, names):
    own, mine = two(name), accelerate(two(name))
    train_all(own, mine)
    weight = torch.linspace(-1, 1, 4 * 6 * 131).view(4, 6, 131)
    mixed = run(mine, weight, adapter_names=names)
    logits = torch.empty_like(mixed[0])
    for adapter in dict.fromkeys(names):
        rows = [i for i, n in enumerate(names) if n == adapter]
        if adapter == "__base__":
            with own.disable_adapter():
                logits[rows] = own(input_ids=IDS[rows]).logits.detach()
            continue
        own.set_adapter(adapter)
        part = own(input_ids=IDS[rows]).logits
        (part * weight[rows]).sum().backward()
        logits[rows] = part.detach()
    same(mixed, (logits, grads(own)))


def test_every_row_routed_alike_is_bit_equal_to_that_adapter_active():
    mine = accelerate(two()).eval()
    for names, context in ((["actor"] * 4, None), (["__base__"] * 4, mine.disable_adapter)):
        routed = mine(input_ids=IDS, adapter_names=names).logits
        if context is None:
            assert torch.equal(routed, mine(input_ids=IDS).logits)
        else:
            with context():
                assert torch.equal(routed, mine(input_ids=IDS).logits)


def test_wrong_adapter_names_are_errors_in_training_as_in_eval():
    mine = accelerate(two())
    with pytest.raises(ValueError, match="'absent' is on no layer"):
        mine(input_ids=IDS, adapter_names=["actor", "critic", "absent", "actor"])
    with pytest.raises(ValueError, match="24 rows"):
        mine(input_ids=IDS, adapter_names=["actor"] * 5)
    assert torch.isfinite(mine(input_ids=IDS).logits).all()
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        mine.eval()(input_ids=IDS, adapter_names=["actor"] * 3)


def test_a_nan_adapter_stays_with_its_rows():
    mine = accelerate(two())
    for path, parameter in mine.named_parameters():
        if ".critic.weight" in path:
            parameter.data.fill_(float("nan"))
    nan = mine(input_ids=IDS, adapter_names=["actor", "critic", "__base__", "actor"]).logits.isnan()
    assert [bool(row.any()) for row in nan] == [False, True, False, False]


def test_mixed_training_with_dropout_drops_in_training_and_matches_the_parts_without():
    mine = accelerate(two(lora_dropout=0.3))
    train_all(mine)
    names = ["actor", "__base__", "critic", "actor"]
    torch.manual_seed(3)
    first = run(mine, adapter_names=names)
    torch.manual_seed(3)
    again = run(mine, adapter_names=names)
    assert torch.equal(first[0], again[0])
    still = accelerate(two())
    train_all(still)
    still_out = run(still, adapter_names=names)
    assert torch.equal(first[0][1], still_out[0][1]) or torch.allclose(first[0][1], still_out[0][1], atol=1e-5)
    assert (first[0][0] - still_out[0][0]).abs().max() > 1e-3
    assert first[1].keys() == still_out[1].keys()


def test_a_route_takes_rows_slots_and_rows_without_gradients():
    """The roles of one batch: two trained adapters and the base as reference, whose rows need no gradient."""
    own, mine = two(), accelerate(two())
    train_all(own, mine)
    weight = torch.linspace(-1, 1, 4 * 6 * 131).view(4, 6, 131)
    weight[3] = 0
    expected = run(own.eval(), weight, adapter_names=["critic", "actor", "actor", "__base__"])
    index = torch.tensor([0, 1, 1, -1])
    routings = [
        index,
        index.repeat_interleave(6),
        Routing.from_runs([(0, 1, 0), (1, 3, 1), (3, 4, -1)], 2),
        Routing.from_runs([(0, 1, 0), (1, 3, 1), (3, 4, -1)], 2, grad_rows=3),
    ]
    for routing in routings:
        with route(mine, routing, ("critic", "actor")):
            same(run(mine, weight), expected)
    mine.set_adapter("actor")
    train_all(mine)
    with route(mine, index, ("critic", "actor")), mine.disable_adapter():
        torch.testing.assert_close(mine(input_ids=IDS).logits, build("llama")(input_ids=IDS).logits)


def test_an_adapter_that_no_row_uses_has_no_gradient():
    mine = accelerate(two())
    train_all(mine)
    with route(mine, torch.tensor([0, 0, -1, 0]), ("critic", "actor")):
        mine(input_ids=IDS).logits.sum().backward()
    unused = [p.grad for n, p in mine.named_parameters() if ".actor.weight" in n]
    assert unused == [None] * len(unused)


def test_wrong_routes_are_errors():
    mine = accelerate(two())
    index = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="'absent' is on no layer"), route(mine, index, ["absent"]):
        pass
    with pytest.raises(IndexError, match="adapter_index holds 1"), route(mine, index + 1, ["actor"]):
        pass
    one = Routing.from_runs([(0, 4, 0)], 1)
    with pytest.raises(ValueError, match="1 adapters; adapters has 2"), route(mine, one, ["actor", "critic"]):
        pass
    with pytest.raises(TypeError, match="sequence of names"), route(mine, index, "actor"):
        pass
    with pytest.raises(ValueError, match="not accelerated"), route(two(), index, ["actor"]):
        pass


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("way", ["adapter_names", "route"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpointed_forward_is_recomputed_under_its_own_route(name, way, reentrant):
    """Forward A, forward B, backward A: A's gradients."""
    plain, mine = accelerate(two(name)), accelerate(two(name))
    train_all(plain, mine)
    expected = run(plain, adapter_names=["actor", "actor", "critic", "__base__"])
    mine.gradient_checkpointing_enable({"use_reentrant": reentrant})
    mine.enable_input_require_grads()
    weight = torch.linspace(-1, 1, 4 * 6 * 131).view(4, 6, 131)

    def forward(names):
        if way == "adapter_names":
            return mine(input_ids=IDS, adapter_names=names).logits
        with route(mine, torch.tensor([{"actor": 0, "critic": 1}.get(n, -1) for n in names]), ("actor", "critic")):
            return mine(input_ids=IDS).logits

    first = forward(["actor", "actor", "critic", "__base__"])
    forward(["critic", "critic", "actor", "actor"])
    mine(input_ids=IDS)
    (first * weight).sum().backward()
    same((first.detach(), grads(mine)), expected)
    unrouted = mine(input_ids=IDS).logits  # a forward without a route is recomputed without one
    forward(["critic"] * 4)
    (unrouted * weight).sum().backward()
    same((unrouted.detach(), grads(mine)), run(plain))


def test_checkpointing_that_loses_the_route_is_an_error():
    from torch.utils.checkpoint import checkpoint

    mine = accelerate(two())
    with route(mine, torch.tensor([1, 0, 0, 1]), ("actor", "critic")):
        logits = checkpoint(lambda: mine(input_ids=IDS).logits, use_reentrant=False)
    with pytest.raises(RuntimeError, match="without the route of its forward"):
        logits.sum().backward()


# ---- what PEFT does to a model ---------------------------------------------------------------------------------------


def test_adapters_added_deleted_and_activated_later_are_served():
    own, mine = both()
    for model in (own, mine):
        model.add_adapter("later", config(r=5))
        model.set_adapter("later")
        stir(model)
    same(run(mine), run(own))
    for model in (own, mine):
        model.delete_adapter("default")
    same(run(mine), run(own))


def test_a_layer_added_later_waits_for_the_next_call():
    own, mine = both(target_modules=["q_proj"])
    for model in (own, mine):
        model.add_adapter("wide", config(target_modules=["q_proj", "v_proj"]))
        model.set_adapter("wide")
        stir(model)
    same(run(mine), run(own))
    assert set(accelerated(mine).values()) == {None, "accelerate was not called"}
    index = torch.zeros(4, dtype=torch.long)
    with (
        pytest.raises(ValueError, match=r"v_proj cannot be routed: .* call accelerate again"),
        route(mine, index, ["wide"]),
    ):
        pass
    accelerate(mine)
    assert set(accelerated(mine).values()) == {None}
    same(run(mine), run(own))


def test_adapters_are_saved_and_loaded_as_pefts(tmp_path):
    own, mine = both()
    theirs_state, state = peft.get_peft_model_state_dict(own), peft.get_peft_model_state_dict(mine)
    assert state.keys() == theirs_state.keys()
    assert all(torch.equal(state[k], theirs_state[k]) for k in state)
    assert mine.state_dict().keys() == own.state_dict().keys()
    assert [id(p) for p in mine.parameters()] == [id(p) for p in accelerate(mine).parameters()]
    mine.save_pretrained(tmp_path)
    again = accelerate(peft.PeftModel.from_pretrained(build("llama"), tmp_path))
    plain = peft.PeftModel.from_pretrained(build("llama"), tmp_path)
    expected = own.eval()(input_ids=IDS).logits
    for model in (again, plain):
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_restore_is_as_if_never_accelerated():
    own, mine = both()
    accelerate(accelerate(mine))
    run(mine)
    types = [type(m) for m in own.modules()]
    assert [type(m) for m in mine.modules()] != types
    restore(mine)
    assert [type(m) for m in mine.modules()] == types
    assert [m.__dict__.keys() for m in mine.modules()] == [m.__dict__.keys() for m in own.modules()]
    expected, got = run(own), run(mine)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][k], v) for k, v in expected[1].items())
    assert restore(mine) is mine
    mine.gradient_checkpointing_enable({"use_reentrant": False})
    before = {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in mine.modules()}
    with route(accelerate(mine), torch.zeros(4, dtype=torch.long), ["default"]):
        mine(input_ids=IDS)
    restore(mine)
    assert before == {id(m): m.__dict__.get("_gradient_checkpointing_func") for m in mine.modules()}
    with pytest.raises(ValueError, match="in training mode"):
        mine(input_ids=IDS, adapter_names=["default"] * 4)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_accelerated_and_on_its_own(how):
    _, mine = both("llama", {"actor": {}, "critic": {}})
    expected = run(mine)
    twin = how(mine)
    assert set(accelerated(twin).values()) == {None}
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter.zero_()
    with route(mine, torch.zeros(4, dtype=torch.long), ["critic"]):  # routes the one, not the other
        same(run(twin), expected)


def test_layers_that_are_not_supported_keep_pefts_forward(caplog):
    layers = {"target_modules": ["embed_tokens", "q_proj", "v_proj"]}
    own, mine = theirs(**layers), accelerate(theirs(**layers))
    left = {path: why for path, why in accelerated(mine).items() if why}
    assert left == {"base_model.model.model.embed_tokens": "PEFT's Embedding layer is not supported"}
    assert "1 of 5 LoRA layers keep PEFT's forward" in caplog.text
    same(run(mine), run(own))
    with pytest.raises(ValueError, match="in training mode"):
        mine(input_ids=IDS, adapter_names=["default"] * 4)
    names = ["default", "__base__"] * 2
    expected = own.eval()(input_ids=IDS, adapter_names=names).logits
    torch.testing.assert_close(mine.eval()(input_ids=IDS, adapter_names=names).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"use_dora": True}, "no plain LoRA .DoraLinearVariant"), ({"lora_bias": True}, "no plain LoRA .lora_bias")],
    ids=["DoRA", "lora_bias"],
)
def test_a_model_without_a_supported_layer_is_an_error(options, why):
    model = theirs("gpt2", **options)
    with pytest.raises(ValueError, match=why):
        accelerate(model)
    with pytest.raises(ValueError, match="it has none"):
        accelerate(build("gpt2"))


def test_an_unsupported_adapter_beside_a_supported_one_is_pefts():
    adapters = {"actor": {}, "critic": {"lora_bias": True}, "dora": {"use_dora": True}}
    own, mine = both("gpt2", adapters)
    for active in (["actor"], ["critic"], ["dora"], ["actor", "critic"]):
        for model in (own, mine):
            model.base_model.set_adapter(active)
        same(run(mine), run(own))


def test_modules_to_save_train_and_cannot_be_mixed_in_training():
    own, mine = both("llama", modules_to_save=["lm_head"])
    same(run(mine), run(own))
    index = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="takes one adapter a forward"), route(mine, index, ["default"]):
        pass


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "rlhf_kernels.integrations.peft_layers")
    monkeypatch.setattr("rlhf_kernels.integrations.peft_layers", None, raising=False)
    monkeypatch.delattr("rlhf_kernels.integrations.peft_layers")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"rlhf-kernels\[peft\]"):
        accelerate(nn.Linear(2, 2))


def test_compiled_models_work():
    torch._dynamo.reset()
    own, mine = both("llama", target_modules=["q_proj", "down_proj"])
    expected = run(own)
    logits, found = run(torch.compile(mine, backend="aot_eager"))
    same((logits, {path.removeprefix("_orig_mod."): grad for path, grad in found.items()}), expected)


def test_a_layer_compiles_whole():
    torch._dynamo.reset()
    own, mine = both()
    x = torch.randn(2, 3, 48, requires_grad=True)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    compiled = torch.compile(mine.get_submodule(path), fullgraph=True, backend="aot_eager")
    for context in (contextlib.nullcontext, mine.disable_adapter):
        with context():
            y = compiled(x)
            torch.testing.assert_close(y, mine.get_submodule(path)(x))
    torch.testing.assert_close(compiled(x), own.get_submodule(path)(x), rtol=1e-5, atol=1e-6)


# ---- projections together --------------------------------------------------------------------------------------------


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
        run_any(mine, None)
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
    assert ops == [3, 1, 1] + [1, 1, 1]
    for y, expected in zip(results[3], results[0]):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
