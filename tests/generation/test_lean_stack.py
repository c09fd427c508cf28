"""A whole step as one op: the model's results, each row's bits its own, and only where the model is a plain stack."""

import pytest
import torch
from architectures import build
from generation_models import greedy, prompts, slice_bytes
from torch import nn

from rlhf_kernels.generation import SamplingParams, SlicedGenerator, lean
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.generation.forward import HydraForward, PlainForward
from rlhf_kernels.generation.lean_stack import VECTOR_UNIT
from rlhf_kernels.integrations.transformers import SlicedRows
from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_kernels.nn.lora import lora_layers
from rlhf_kernels.ops import registry

pytestmark = pytest.mark.skipif(
    not registry.native_available() or torch.ops.rlhf_kernels.bf16_isa() != VECTOR_UNIT, reason="needs AVX512-BF16"
)
NAMES = ["llama", "qwen2", "qwen3", "mistral"]
SLICE = 4


class Sequences:
    """Some sequences in an arena, `forward`'s steps over whichever of their tokens are next."""

    def __init__(self, forward, lists):
        self.forward, self.lists, self.done = forward, lists, [0] * len(lists)
        self.width = max(-(-len(tokens) // SLICE) for tokens in lists)
        count = self.width * len(lists)
        heads, k, v = Arena.from_config(forward.lm, "1MiB", SLICE).layers[0]
        nbytes = count * SLICE * 2 * heads * (k + v) * 2 + 4096
        self.arena = Arena.from_config(forward.lm, nbytes, SLICE)
        self.table = torch.arange(count, dtype=torch.int32).view(len(lists), self.width).flip(0)

    def step(self, **tokens):
        """tokens: s<number>=how many of that sequence's come. Returns {number: logits of its last one}."""
        taken = {int(name[1:]): n for name, n in tokens.items()}
        places = [(i, self.done[i] + j) for i, n in taken.items() for j in range(n)]
        for i, n in taken.items():
            self.done[i] += n
        ids = torch.tensor([self.lists[i][p] for i, p in places])
        slots = torch.tensor([int(self.table[i, p // SLICE]) * SLICE + p % SLICE for i, p in places])
        ends = torch.tensor([0, *taken.values()]).cumsum(0)
        lengths = torch.tensor([self.done[i] for i in taken], dtype=torch.int32)
        packed = SlicedRows(self.arena, slots, self.table[list(taken)].contiguous(), lengths, ends.int())
        positions = torch.tensor([p for _, p in places])
        return dict(zip(taken, self.forward.logits(ids, positions, packed, ends[1:] - 1)))


@pytest.fixture
def steps():
    """Steps of a bf16 model under its own op."""

    def of(name):
        lm = build(name, torch.bfloat16)
        return PlainForward(lm), lm

    return of


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_rows_bits_depend_on_nothing_beside_it(name, steps):
    """Alone or among 75 others, whole or in pieces, wanted with all rows of the step or with a few."""
    forward, lm = steps(name)
    lists = prompts([11, 7, 40, 30, 5])
    with forward.prepared():
        assert "forward" in lm.__dict__
        apart = Sequences(forward, lists)
        want = [apart.step(**{f"s{i}": len(tokens)})[i] for i, tokens in enumerate(lists)]
        together = Sequences(forward, lists)
        got = together.step(s0=11, s1=7, s2=40, s3=30, s4=5)
        pieces = Sequences(forward, lists)
        pieces.step(s2=13, s0=10)
        pieces.step(s2=26, s3=29, s1=6)
        one_each = pieces.step(s0=1, s1=1, s2=1, s3=1)
    assert all(torch.equal(got[i], want[i]) for i in range(5))
    assert all(torch.equal(one_each[i], want[i]) for i in range(4))


def test_bf16_rollouts_are_the_same_to_the_bit_at_any_budget_and_order():
    lm, lists = build("llama", torch.bfloat16), prompts([9, 1, 14, 30, 3, 22, 17, 8])
    params = [SamplingParams(max_new_tokens=12, temperature=0.5 + i % 3, n=1 + i % 2) for i in range(8)]
    found = []
    for slices, active, order in ((200, None, range(8)), (40, 5, range(8)), (12, 3, [3, 1, 0, 7, 5, 6, 2, 4])):
        generator = SlicedGenerator(lm, slices * slice_bytes(lm), slice_tokens=SLICE, max_active=active, step_tokens=13)
        rollouts = generator.generate([lists[i] for i in order], [params[i] for i in order], streams=list(order))
        found.append({(order[r.prompt_index], r.sample_index): (r.tokens, r.logprobs) for r in rollouts})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("rank", [4, 3, 34])
@torch.no_grad()
def test_a_role_runs_through_its_adapter(rank, monkeypatch):
    torch.manual_seed(0)
    model = HydraModel({"base": build("qwen2", torch.bfloat16)}, adapters={"actor": LoraSpec(r=rank, alpha=rank)})
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["actor"], std=0.1)
    lists, calls = prompts([9, 1, 14]), []
    own = torch.ops.rlhf_kernels.decoder_step
    found = {}
    monkeypatch.setattr(torch.ops.rlhf_kernels, "decoder_step", lambda *a: calls.append(1) or own(*a))
    for role in ("actor", "reference"):
        forward = HydraForward(model, role)
        with forward.prepared():
            calls.clear()
            got = Sequences(forward, lists).step(s0=9, s1=1, s2=14)
        assert calls == [1]
        want = Sequences(forward, lists).step(s0=9, s1=1, s2=14)  # the model's own modules
        found[role] = want[0]
        assert all(lean.relative_error(got[i], want[i]) < 2e-2 for i in range(3))
    assert lean.relative_error(found["actor"], found["reference"]) > 0.1


def test_a_model_that_does_more_than_a_stack_keeps_its_forward():
    lm = build("llama", torch.bfloat16)

    class Scaled(type(lm)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    lm.__class__ = Scaled
    with torch.no_grad(), PlainForward(lm).prepared():
        assert "forward" not in lm.__dict__
        assert "forward" in lm.model.layers[0].__dict__


def test_a_hook_anywhere_keeps_the_models_own_forward():
    lm, calls = build("llama", torch.bfloat16), []
    SlicedGenerator(lm, "1MiB").generate(prompts([5]), greedy(max_new_tokens=2))
    handle = lm.model.register_forward_hook(lambda *_: calls.append(1))
    SlicedGenerator(lm, "1MiB").generate(prompts([5]), greedy(max_new_tokens=3))
    assert len(calls) == 3
    handle.remove()


@torch.no_grad()
def test_a_token_outside_the_vocabulary_is_an_error():
    forward = PlainForward(build("llama", torch.bfloat16))
    with forward.prepared(), pytest.raises(RuntimeError, match="ids: out of range"):
        Sequences(forward, [[3, 131]]).step(s0=2)
