"""Projections that read one tensor are computed together, and nothing but the number of ops tells."""

import copy
import threading
import weakref

import pytest
import torch
from architectures import build
from torch import nn

from rlhf_kernels.nn import LoraSpec, attach_adapters, siblings
from rlhf_kernels.nn.lora import detach_adapter, lora_layers
from rlhf_kernels.ops.lora import Routing

GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma2"]
RUNS = [(0, 5, 0), (5, 9, 1), (9, 12, -1)]
IDS = torch.arange(12)[None]


def adapted(name="llama", fuse=True, specs=None, dtype=torch.float32):
    """A frozen model whose adapters do something, and its routes."""
    model = build(name, dtype).requires_grad_(False)
    routes = attach_adapters(model, specs or {"a": LoraSpec(r=3), "b": LoraSpec(r=2)}, fuse=fuse)
    for layer in lora_layers(model).values():
        for b in layer.lora_B.values():
            nn.init.normal_(b, std=0.2)
    return model, routes


def attention(fuse=True, **options):
    model, routes = adapted(fuse=fuse, **options)
    return model.model.layers[0].self_attn, routes


def routed(adapter=0, rows=12, adapters=2):
    return Routing.from_runs([(0, rows, adapter)], adapters)


def distance(got, want):
    return (got - want).norm() / want.norm()


@pytest.fixture
def ops(monkeypatch):
    """How many projections each call of the op computed."""
    widths, apply = [], siblings.apply

    def counted(x, weights, *args, **kwargs):
        widths.append(len(weights))
        return apply(x, weights, *args, **kwargs)

    monkeypatch.setattr(siblings, "apply", counted)
    return widths


@pytest.mark.parametrize("name", GATED)
def test_fused_projections_have_the_outputs_and_gradients_of_projections_apart(name, ops):
    def run(fuse):
        ops.clear()
        model, routes = adapted(name, fuse)
        with routes.use(Routing.from_runs(RUNS, 2, grad_rows=9)):
            logits = model(IDS, use_cache=False).logits
        (logits[:, :9] * torch.linspace(-1, 1, 131)).sum().backward()
        return logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, list(ops)

    logits, grads, calls = run(True)
    want, want_grads, want_calls = run(False)
    assert calls == [3, 1, 2, 1] * 2
    assert want_calls == [1] * 14
    assert distance(logits, want) < 1e-5
    for path, grad in want_grads.items():
        assert grad.any(), path
        assert distance(grads[path], grad) < 1e-4, path


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
def test_models_with_one_matrix_for_q_k_and_v_have_no_siblings(name):
    model, _ = adapted(name)
    assert all(layer.siblings == [layer] for layer in lora_layers(model).values())


def test_adapters_on_some_siblings_fuse_these(ops):
    model, routes = adapted(specs={"a": LoraSpec(r=2, target_modules=["q_proj", "v_proj"])})
    with routes.use(routed(adapters=1)):
        together = model(IDS, use_cache=False).logits
    assert ops == [2, 2]
    for layer in lora_layers(model).values():
        layer.siblings = [layer]
    with routes.use(routed(adapters=1)):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, together, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_a_sibling_lacks_bypasses_that_sibling_alone():
    specs = {"a": LoraSpec(r=2, target_modules=["q_proj"]), "b": LoraSpec(r=2)}
    (layer, routes), (apart, _) = attention(specs=specs), attention(fuse=False, specs=specs)
    x = torch.randn(12, 48)
    with routes.use(Routing.from_runs(RUNS, 2)):
        q, k = layer.q_proj(x), layer.k_proj(x)
    apart.q_proj.routes = apart.k_proj.routes = routes
    with routes.use(Routing.from_runs(RUNS, 2)):
        torch.testing.assert_close(q, apart.q_proj(x))
        torch.testing.assert_close(k, apart.k_proj(x))
    assert torch.equal(k[:5], layer.k_proj(x)[:5])  # outside a forward: the base
    assert not torch.equal(k[5:9], layer.k_proj(x)[5:9])


@pytest.mark.parametrize("use", ["another tensor", "a copy", "not called", "called twice", "in another order"])
def test_an_output_is_right_however_its_siblings_are_called_and_none_outlives_the_forward(use):
    layer, routes = attention()
    names = {
        "not called": ["q_proj", "v_proj"],
        "called twice": ["q_proj", "q_proj", "k_proj", "k_proj", "v_proj"],
        "in another order": ["v_proj", "q_proj", "k_proj", "q_proj"],
    }.get(use, ["q_proj", "k_proj", "v_proj"])
    x, other = torch.randn(12, 48), torch.randn(12, 48)
    inputs = [x] * len(names)
    if use in ("another tensor", "a copy"):
        inputs[1] = other if use == "another tensor" else x.clone()
    with routes.use(routed()):
        got = [getattr(layer, name)(value) for name, value in zip(names, inputs)]
        again = [getattr(layer, name)(x) for name in ("k_proj", "q_proj")]
    for name, value, y in zip(names, inputs, got):
        with routes.use(routed()):
            torch.testing.assert_close(y, getattr(layer, name)(value.clone()))
    alive = [weakref.ref(t) for t in (*inputs, *got, *again)]
    del x, other, inputs, got, again, value, y
    assert [ref() for ref in alive] == [None] * len(alive)


def test_at_most_one_groups_outputs_are_kept_ahead():
    """A layer whose projections are not all called holds nothing once the next layer's run."""
    model, routes = adapted()
    first, second = (block.self_attn for block in model.model.layers)
    with routes.use(routed()):
        first.q_proj(torch.randn(12, 48))
        ahead = [weakref.ref(found.y) for found in routes.running.pending.outputs.values()]
        assert len(ahead) == 2
        second.q_proj(torch.randn(12, 48))
        assert [ref() for ref in ahead] == [None, None]


def test_an_exception_in_a_forward_leaves_nothing_for_the_next():
    layer, routes = attention()
    x = torch.randn(12, 48)
    with pytest.raises(ValueError, match="routed for 12"), routes.use(routed(0)):
        layer.o_proj(layer.q_proj(x)[:5])
    with routes.use(routed(1)):
        got = layer.k_proj(x)
    with routes.use(routed(1)):
        assert torch.equal(got, layer.k_proj(x))


CHANGES = {
    "x is written to": lambda layer, x: x.mul_(2),
    "a weight is written to": lambda layer, x: layer.k_proj.weight.mul_(2),
    "an adapter is written to": lambda layer, x: layer.k_proj.lora_B["a"].mul_(2),
    "a weight is replaced": lambda layer, x: setattr(layer.k_proj, "weight", nn.Parameter(layer.k_proj.weight * 2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_what_changes_between_two_siblings_is_seen_by_the_second(change, mode):
    layer, routes = attention()
    with mode():
        x = torch.randn(12, 48)
        with routes.use(routed()):
            before = layer.q_proj(x)
            change(layer, x)
            after = layer.k_proj(x)
        with routes.use(routed()):
            torch.testing.assert_close(after, layer.k_proj(x.clone()))
        assert before.shape == (12, 48)


def test_a_sibling_called_under_no_grad_has_no_gradient_and_the_other_way_round():
    layer, routes = attention()
    x = torch.randn(12, 48)
    with routes.use(routed()):
        with torch.no_grad():
            q = layer.q_proj(x)
        k = layer.k_proj(x)
        with torch.no_grad():
            v = layer.v_proj(x)
    assert [y.requires_grad for y in (q, k, v)] == [False, True, False]


def test_gradients_of_a_sibling_that_is_not_called_are_none_or_zero_and_the_others_right():
    grads = {}
    for fuse in (True, False):
        layer, routes = attention(fuse)
        x = torch.linspace(-1, 1, 12 * 48).view(12, 48).requires_grad_()
        with routes.use(routed()):
            (layer.q_proj(x).square().sum() + layer.v_proj(x).sum()).backward()
        assert layer.k_proj.lora_A["a"].grad is None or not layer.k_proj.lora_A["a"].grad.any()
        grads[fuse] = [x.grad, layer.q_proj.lora_A["a"].grad, layer.v_proj.lora_B["a"].grad]
    for got, want in zip(grads[True], grads[False]):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_output_may_be_written_to_and_its_siblings_do_not_see_it():
    layer, routes = attention()
    x = torch.randn(12, 48, requires_grad=True)
    with routes.use(routed()):
        q = layer.q_proj(x).mul_(3)
        k = layer.k_proj(x).add_(1)
    with routes.use(routed()):
        torch.testing.assert_close(q, 3 * layer.q_proj(x.clone()))
        torch.testing.assert_close(k, 1 + layer.k_proj(x.clone()))
    (q.sum() + k.sum()).backward()
    assert x.grad.any()


def test_hooks_of_a_sibling_see_and_change_its_own_values():
    (layer, routes), (apart, apart_routes) = attention(), attention(False)
    x, seen = torch.randn(12, 48, requires_grad=True), {}
    results = []
    for module, mine in ((layer, routes), (apart, apart_routes)):
        module.q_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        module.k_proj.register_forward_hook(lambda _m, _args, out: seen.setdefault(_m, out) + 1)
        module.v_proj.register_full_backward_hook(lambda _m, grad_in, grad_out: seen.setdefault((_m, "grad"), grad_in))
        with mine.use(routed()):
            results.append([module.q_proj(x), module.k_proj(x), module.v_proj(x)])
        sum(y.square().sum() for y in results[-1]).backward()
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(seen[layer.k_proj] + 1, results[0][1])
    torch.testing.assert_close(seen[layer.v_proj, "grad"], seen[apart.v_proj, "grad"])


def test_forwards_on_two_threads_and_inside_each_other_keep_their_own_routing():
    layer, routes = attention()
    x = torch.randn(12, 48)

    def projections():
        return [p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj)]

    want = []
    for adapter in (0, 1):
        with routes.use(routed(adapter)):
            want.append(projections())
    wrong, barrier = [], threading.Barrier(2)

    def work(adapter):
        barrier.wait()
        for _ in range(30):
            with routes.use(routed(adapter)):
                if not all(torch.equal(a, b) for a, b in zip(projections(), want[adapter])):
                    wrong.append(adapter)

    threads = [threading.Thread(target=work, args=(adapter,)) for adapter in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    with routes.use(routed(0)):
        q = layer.q_proj(x)
        with routes.use(routed(1)):
            inner = projections()
        k = layer.k_proj(x)
    assert torch.equal(q, want[0][0])
    assert torch.equal(k, want[0][1])
    assert all(torch.equal(a, b) for a, b in zip(inner, want[1]))


def test_groups_follow_attaching_deleting_and_copying(ops):
    model, routes = adapted(specs={"a": LoraSpec(r=2, target_modules="q_proj")})
    layer = model.model.layers[0].self_attn
    assert layer.q_proj.siblings == [layer.q_proj]
    attach_adapters(model, {"b": LoraSpec(r=2)})
    assert layer.k_proj.siblings == [layer.q_proj, layer.k_proj, layer.v_proj]
    twin = copy.deepcopy(model)
    block = twin.model.layers[0].self_attn
    assert block.k_proj.siblings == [block.q_proj, block.k_proj, block.v_proj]
    assert block.k_proj.routes is twin._adapter_routes
    assert block.k_proj.routes is not routes
    detach_adapter(model, "a")
    detach_adapter(model, "b")
    with routes.use(routed(-1, adapters=0)):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, build("llama")(IDS).logits)
    assert ops == [3, 1, 2, 1] * 2
    attach_adapters(model, {"c": LoraSpec(r=2)}, fuse=False)
    assert layer.k_proj.siblings == [layer.k_proj]


def test_a_model_compiles_whole():
    model, routes = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with routes.use(Routing.from_runs(RUNS, 2)):
        want = model(IDS, use_cache=False).logits
        assert distance(compiled(IDS, use_cache=False).logits, want) < 1e-5


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "apart"])
def test_a_block_compiles_whole(fuse):
    layer, routes = attention(fuse)

    def block(x):
        q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
        return q.square().sum() + (k * v).sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, 48)
    for adapter in (0, 1):
        results = []
        for run in (block, compiled):
            mine = x.clone().requires_grad_()
            layer.zero_grad()
            with routes.use(routed(adapter)):
                loss = run(mine)
                assert routes.running.pending is None
            loss.backward()
            results.append([loss, mine.grad, layer.k_proj.lora_A["ab"[adapter]].grad])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_compiled_block_sees_what_is_written_between_two_siblings():
    layer, routes = attention()

    def block(x):
        x = x * 2
        q = layer.q_proj(x)
        x.mul_(3)
        return q, layer.k_proj(x)

    x = torch.randn(12, 48)
    with torch.no_grad(), routes.use(routed()):
        want = block(x)
    with torch.no_grad(), routes.use(routed()):
        got = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    for mine, other in zip(got, want):
        torch.testing.assert_close(mine, other)
