"""What a decoder block with adapters keeps for its backward: the references it needs, and no copies beside them."""

import copy

import pytest
import torch
from architectures import build
from torch import nn

from rlhf_kernels.nn import LoraSpec, attach_adapters
from rlhf_kernels.nn.lora import lora_layers
from rlhf_kernels.ops.lora import Routing

ROWS = 32


def saved_tensors(run):
    """run()'s result and every tensor autograd saved on the way, by storage: {address: (dtype, bytes)}."""
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (tensor.dtype, storage.nbytes())
        alive.append(tensor)  # so that no later storage takes this address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, found


def parameters_of(module):
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def block(adapter_dtype=torch.float32, dtype=torch.bfloat16, fuse=True):
    model = build("llama", dtype).requires_grad_(False)
    routes = attach_adapters(model, {"a": LoraSpec(r=4, dtype=adapter_dtype), "b": LoraSpec(r=4)}, fuse=fuse)
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values():
            nn.init.normal_(b, std=0.2)
    return model.model.layers[0], routes


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_activation_is_saved_in_the_adapters_dtype(adapter_dtype):
    layer, routes = block(adapter_dtype)
    x = torch.randn(ROWS, 48, dtype=torch.bfloat16, requires_grad=True)
    with routes.use(Routing.from_runs([(0, ROWS, 0)], 2)):
        outs, saved = saved_tensors(lambda: [layer.self_attn.q_proj(x), layer.mlp.up_proj(x)])
    weights = parameters_of(layer)
    assert {dtype for address, (dtype, _) in saved.items() if address not in weights} == {torch.bfloat16}
    sum(y.float().sum() for y in outs).backward()
    assert layer.self_attn.q_proj.lora_A["a"].grad.dtype == adapter_dtype


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_either_dtype_under_a_bf16_base_are_as_exact_as_the_formula_in_bf16(adapter_dtype):
    """Against float64; the plain formula in bf16, its adapters cast, is the yardstick."""
    module, routes = block(adapter_dtype)
    layer = module.self_attn.q_proj
    x, dy = torch.randn(ROWS, 48, dtype=torch.bfloat16), torch.randn(ROWS, 48, dtype=torch.bfloat16)

    def formula(dtype):
        mine = x.to(dtype, copy=True).requires_grad_()
        weight = layer.weight.to(dtype)
        a, b = (p["a"].detach().bfloat16().to(dtype).requires_grad_() for p in (layer.lora_A, layer.lora_B))
        y = mine @ weight.T + 8.0 * (mine @ a.T) @ b.T
        y.backward(dy.to(dtype))
        return [t.detach().double() for t in (y, mine.grad, a.grad, b.grad)]

    mine = x.clone().requires_grad_()
    with routes.use(Routing.from_runs([(0, ROWS, 0)], 2)):
        y = layer(mine)
    y.backward(dy)
    got = [t.detach().double() for t in (y, mine.grad, layer.lora_A["a"].grad, layer.lora_B["a"].grad)]
    for name, ours, plain, exact in zip(("y", "dx", "dA", "dB"), got, formula(torch.bfloat16), formula(torch.float64)):
        factor = 2 if name == "y" else 3
        assert (ours - exact).abs().max() <= factor * (plain - exact).abs().max() + 2e-7, name
        assert (ours - exact).norm() <= 1e-2 * exact.norm(), name


def test_siblings_keep_x_once_under_autocast_too():
    """Each projection apart casts an fp32 x to bf16 for itself."""
    kept = {}
    for fuse in (True, False):
        layer, routes = block(torch.float32, torch.float32, fuse)
        x = torch.randn(ROWS, 48, requires_grad=True)

        def projections(layer=layer, x=x):
            return [p(x) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]

        with routes.use(Routing.from_runs([(0, ROWS, 0)], 2)), torch.autocast("cpu", torch.bfloat16):
            _, saved = saved_tensors(projections)
        kept[fuse] = [size for dtype, size in saved.values() if size == 2 * ROWS * 48]
    assert len(kept[True]) == 1
    assert len(kept[False]) == 3


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_rows_that_need_no_gradient_save_nothing_of_their_own(fuse):
    """s is as long as grad_rows; x, alive anyway, is a reference."""
    layer, routes = block(dtype=torch.float32, fuse=fuse)
    attention, weights = layer.self_attn, parameters_of(layer)
    x = torch.randn(ROWS, 48, requires_grad=True)
    sizes = {}
    for grad_rows in (ROWS, 8):
        with routes.use(Routing.from_runs([(0, 8, 0), (8, ROWS, -1)], 2, grad_rows)):
            _, saved = saved_tensors(lambda: [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        own = {a: size for a, (_, size) in saved.items() if a not in weights and a != x.data_ptr()}
        sizes[grad_rows] = sum(own.values())
    assert sizes == {ROWS: ROWS * 12 * 4, 8: 8 * 12 * 4}


def test_a_bypassed_forward_saves_references_only():
    layer, routes = block(dtype=torch.float32)
    x = torch.randn(ROWS, 48, requires_grad=True)
    known = parameters_of(layer) | {x.data_ptr()}
    with routes.use(Routing.from_runs([(0, ROWS, -1)], 2)):
        _, saved = saved_tensors(lambda: [layer.self_attn.q_proj(x), layer.mlp.down_proj(torch.randn(ROWS, 80))])
    assert sum(size for address, (_, size) in saved.items() if address not in known) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_block_step_saves_less_than_pefts_layers(dtype):
    """One decoder layer, one adapter on every Linear, r=16. In fp32 PEFT casts nothing, so the two are alike."""
    peft = pytest.importorskip("peft")
    model = build("llama", dtype)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"),
    )
    ours = model.requires_grad_(False)
    routes = attach_adapters(ours, {"default": LoraSpec(r=16, alpha=32)})
    x = torch.randn(1, ROWS, 48, dtype=dtype, requires_grad=True)
    positions = torch.arange(ROWS)[None]

    def step(decoder):
        rope = decoder.rotary_emb(x, positions)
        return saved_tensors(lambda: decoder.layers[0](x, position_embeddings=rope, attention_mask=None))[1]

    with routes.use(Routing.from_runs([(0, ROWS, 0)], 1)):
        mine = step(ours.model)
    other = step(theirs.base_model.model.model)

    def own(saved, module):
        weights = parameters_of(module)
        return sum(size for address, (_, size) in saved.items() if address not in weights)

    if dtype == torch.bfloat16:
        assert own(mine, ours) < 0.75 * own(other, theirs)
    else:
        assert own(mine, ours) <= own(other, theirs)
