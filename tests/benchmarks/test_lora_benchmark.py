"""The contestants of `python -m benchmarks lora` do the same work: on small shapes in fp32 they agree with the op's
definition, so that none is timed for something else.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import lora_block, lora_peers
from benchmarks.case import OURS, Case, Unavailable
from benchmarks.lora import MODELS, RANKS, cases
from benchmarks.lora_block import ACTOR, CRITIC, Block
from benchmarks.lora_layer import SCALING, Inputs, Layer, make_inputs, runs
from rlhf_kernels.ops.lora import naive, tier

pytest.importorskip("peft")

ONE = Layer(12, 32, 48, r=8, dtype=torch.float32)
LAYERS = {
    "one": (ONE, lora_peers.ONE_ADAPTER),
    "decode": (replace(ONE, rows=1), lora_peers.DECODE),
    "mixed": (replace(ONE, adapters=3, routed="mixed"), lora_peers.DECODE_MIXED),
    "roles": (replace(ONE, adapters=2, routed="roles"), lora_peers.ROLES),
    "many": (replace(ONE, rows=40, adapters=32, routed="scattered"), lora_peers.MANY),
}
BLOCK = Block(2048, 8192, 32, 8, dtype=torch.float32).tiny()
BLOCKS = {"one adapter": BLOCK, "two adapters": replace(BLOCK, adapters=(ACTOR, CRITIC))}


def definition(inputs: Inputs) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, and the gradients of x, of every A and of every B."""
    a, b = inputs.matrices()
    index = torch.zeros(len(inputs.x), dtype=torch.long) if inputs.index is None else inputs.index
    x = inputs.x.detach().requires_grad_()
    y = naive.lora_linear(x, inputs.weight, None, a, b, index, [SCALING] * len(a))
    return y.detach(), list(torch.autograd.grad(y, [x, *a, *b], inputs.upstream))


def whole(y) -> torch.Tensor:
    return y if isinstance(y, torch.Tensor) else torch.cat(y)


@pytest.mark.parametrize("name", LAYERS)
def test_every_way_through_a_layer_gives_the_same_y(name):
    layer, who = LAYERS[name]
    inputs = make_inputs(layer, "cpu")
    expected, _ = definition(inputs)
    bare = inputs.x.detach() @ inputs.weight.t()
    assert (expected - bare).abs().max() > 0.1  # the adapters matter
    for peer in who:
        y = whole(runs(lora_peers.PEERS[peer](inputs), "forward", inputs)())
        wanted = bare if peer == lora_peers.FROZEN else expected
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, peer=peer: f"{peer}: {m}")


@pytest.mark.parametrize("name", ["one", "mixed", "many"])
def test_every_way_that_trains_gives_the_same_gradients(name):
    layer, who = LAYERS[name]
    inputs = make_inputs(layer, "cpu")
    _, expected = definition(inputs)
    trained = []
    for peer in who:
        linear = lora_peers.PEERS[peer](inputs)
        if not linear.trains:
            with pytest.raises(Unavailable, match="inference only"):
                runs(linear, "both", inputs)
            continue
        run = runs(linear, "both", inputs)
        run()
        _, found = run()  # the second time nothing of the first is left to add to
        wanted = [inputs.upstream @ inputs.weight] if peer == lora_peers.FROZEN else expected
        assert len(found) == len(wanted)
        for gradient, right in zip(found, wanted):
            gradient = torch.zeros_like(right) if gradient is None else gradient  # an adapter that no row uses
            torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5, msg=lambda m, peer=peer: f"{peer}: {m}")
        trained.append(peer)
    assert len(trained) >= 3


def test_peft_has_fp32_adapters_by_default_and_the_bases_dtype_when_told():
    inputs = make_inputs(replace(ONE, dtype=torch.bfloat16), "cpu")
    dtypes = {name: {p.dtype for p in lora_peers.PEERS[name](inputs).parameters} for name in lora_peers.ONE_ADAPTER}
    assert dtypes[lora_peers.PEFT] == dtypes[lora_peers.OURS_FP32] == {torch.float32}
    assert dtypes[lora_peers.PEFT_LOW] == dtypes[OURS] == {torch.bfloat16}


def test_the_frozen_linear_is_one_gemm_forward_and_one_back():
    inputs = make_inputs(ONE, "cpu")
    run = runs(lora_peers.PEERS[lora_peers.FROZEN](inputs), "both", inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert sum(counts.get(name, 0) for name in ("aten::mm", "aten::addmm")) == 2


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_every_way_through_a_block_gives_the_same_output_and_gradients(block):
    inputs = lora_block.make_block(block, "cpu")
    expected = lora_block.results(inputs, lora_block.PEFT)
    compared = 0
    for name in lora_block.CONTESTANTS:
        try:
            found = lora_block.results(inputs, name)
        except Unavailable:
            continue
        if name == lora_block.FROZEN_BLOCK:
            assert not torch.allclose(found[0], expected[0], atol=1e-2)  # the adapters matter
            continue
        rough = {"rtol": 3e-2, "atol": 3e-2} if name == lora_block.OURS_LOW else {"rtol": 1e-4, "atol": 1e-5}
        assert len(found) == len(expected) == 2 + 2 * len(lora_block.LINEARS) * len(block.adapters)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a.to(b.dtype), b, **rough, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_loss_and_gradients_of_a_block_are_those_of_peft(block):
    for check in lora_block.same_step(block, "cpu"):
        assert check.error <= check.at_most, check.what
    loss, gradients = lora_block.same_step(block, "cpu", (lora_block.OURS_LOW,))
    assert loss.error > loss.at_most  # rounded adapters are noticed
    assert gradients.error > gradients.at_most


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_distinct_names_and_cover_shapes_ranks_and_targets(device):
    """Listing the cases makes no inputs, so a machine without the device can list them."""
    listed = list(cases(device))
    names = [case.name for case in listed]
    assert len(set(names)) == len(names)
    for work in ("forward only", "forward + backward"):
        for sizes in MODELS.values():
            for width, out in sizes:
                assert any(name.startswith(work) and f"x {width} -> {out}, r=16" in name for name in names)
        assert {
            r for r in RANKS if any(name.startswith(work) and f"r={r}, bf16 (3B)" in name for name in names)
        } == set(RANKS)
    assert sum(len(case.targets) for case in listed) == {"cpu": 14, "cuda": 4}[device]
    assert [case.name.startswith("sweep") for case in listed] == [case.extra for case in listed]


@pytest.mark.parametrize("case", [case for case in cases("cpu") if not case.extra], ids=lambda case: case.name)
def test_every_contestant_of_every_case_runs(case: Case):
    ran = []
    for name, prepare in case.build(True).items():
        try:
            prepare()()
        except Unavailable:
            continue
        ran.append(name)
    assert {OURS, case.base} <= set(ran)


@pytest.mark.parametrize("case", [case for case in cases("cpu") if case.extra and " 16 x" in case.name])
def test_the_sweep_holds_every_tier_of_the_op_alone(case: Case):
    before = tier.TIERS
    contestants = case.build(True)
    alone = {name for name in contestants if name.startswith(f"{OURS}: ")}
    assert f"{OURS}: library" in alone
    for name in alone:
        contestants[name]()()
        assert tier.TIERS is before
