"""Rows of one batch with adapters of their own, in training too, on an accelerated PEFT model."""

import pytest
import torch
from architectures import build
from peft_models import IDS, WEIGHT, grads, run, same, train_all, two
from torch.utils.checkpoint import checkpoint

from rlhf_kernels.integrations.peft import accelerate, route
from rlhf_kernels.ops.lora import Routing

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
        run(mine, adapter_names=names),
        run(own, adapter_names=names),
    )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("names", MIXED[:2], ids=" ".join)
def test_a_mixed_training_batch_is_its_parts_one_by_one(name, names):
    own, mine = two(name), accelerate(two(name))
    train_all(own, mine)
    weight = WEIGHT
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


@pytest.mark.parametrize("tokens", [1, 3], ids=["one token", "three tokens"])
def test_many_samples_whose_adapters_alternate(tokens):
    own, mine = two().eval(), accelerate(two()).eval()
    train_all(own, mine)
    names = ["actor", "critic", "__base__", "critic"] * 17
    x, results = torch.randn(len(names), tokens, 48), []
    for model in (own, mine):
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        y = layer(x, adapter_names=names)
        y.square().sum().backward()
        results.append((y.detach(), grads(model)))
    same(*reversed(results))


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
    weight = WEIGHT
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
    same(run(mine), run(plain))
    weight = WEIGHT

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


def test_a_checkpointed_forward_does_not_see_its_index_overwritten():
    mine = accelerate(two())
    scattered = torch.arange(IDS.numel()) % 3 - 1

    def gradients():
        index = scattered.clone()
        with route(mine, index, ("actor", "critic")):
            logits = mine(input_ids=IDS).logits
        index.copy_(scattered.flip(0))
        (logits * WEIGHT).sum().backward()
        return logits.detach(), grads(mine)

    plain = gradients()
    mine.gradient_checkpointing_enable({"use_reentrant": False})
    same(gradients(), plain)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_that_loses_the_route_is_an_error(reentrant):
    mine = accelerate(two())
    embeddings = mine.get_input_embeddings()(IDS).detach().requires_grad_()

    def forward(x):
        return mine(inputs_embeds=x).logits

    with route(mine, torch.tensor([1, 0, 0, 1]), ("actor", "critic")):
        logits = checkpoint(forward, embeddings, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="without the route of its forward"):
        logits.sum().backward()


def test_checkpointing_after_routed_forwards_is_no_error():
    """What was routed before, with gradients or without, says nothing about a forward without a route."""
    plain, mine = accelerate(two()), accelerate(two())
    with route(mine, torch.tensor([1, 0, 0, 1]), ("actor", "critic")):
        mine(input_ids=IDS).logits.sum().backward()
    mine.zero_grad()
    mine.eval()(input_ids=IDS, adapter_names=["critic"] * 4)
    mine.train().gradient_checkpointing_enable({"use_reentrant": False})
    same(run(mine), run(plain))
