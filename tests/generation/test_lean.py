"""Lean modules: they compute what the model's own do, only while steps run, and only where that has been proved."""

import pytest
import torch
from architectures import CONFIGS, EXTRA, build
from generation_models import greedy, prompts, record_logits
from torch import nn

from rlhf_kernels.generation import SlicedGenerator, lean
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.generation.forward import HydraForward, PlainForward
from rlhf_kernels.generation.lean_stack import VECTOR_UNIT
from rlhf_kernels.integrations.transformers import PackedRows, SlicedRows
from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_kernels.nn.lora import lora_layers
from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora.tiles import DTYPES

pytestmark = pytest.mark.skipif(
    not registry.native_available() or torch.bfloat16 not in DTYPES, reason="needs the CPU's own bf16 kernels"
)
LEAN = {  # architecture -> kinds of modules that have replacements, inner ones left out where an outer one has one
    "llama": {"LlamaDecoderLayer", "LlamaRMSNorm", "Linear"},
    "qwen2": {"Qwen2DecoderLayer", "Qwen2RMSNorm", "Linear"},
    "qwen3": {"Qwen3DecoderLayer", "Qwen3RMSNorm", "Linear"},
    "mistral": {"MistralDecoderLayer", "MistralRMSNorm", "Linear"},
    "gemma2": {"Gemma2Attention", "Gemma2MLP", "Gemma2RMSNorm", "Linear"},
    "granite": {"GraniteAttention", "GraniteMLP", "GraniteRMSNorm", "Linear"},
    "cohere": {"CohereMLP", "Linear"},  # rotates neighbours, not halves
    "gpt2": {"Linear"},
    "gpt-neox": {"Linear"},
}
WHOLE = {  # architectures whose whole step is one op, where the processor has it
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}


def expected(name: str, dtype: torch.dtype = torch.float32) -> set[str]:
    whole = dtype == torch.bfloat16 and torch.ops.rlhf_kernels.bf16_isa() == VECTOR_UNIT
    return LEAN[name] | ({WHOLE[name]} if whole and name in WHOLE else set())


def replaced(lm) -> set[str]:
    return {type(module).__name__ for module in lm.modules() if "forward" in module.__dict__}


def probed(lm) -> tuple[torch.Tensor, set[str]]:
    """The logits of a packed row under `prepared`, and the modules that were lean."""
    forward = PlainForward(lm)
    with torch.no_grad(), forward.prepared():
        probe = lean.Probe(lm)
        packed = SlicedRows(probe.arena, probe.slots, probe.slice_table, probe.context_lens, probe.cu_q)
        rows = torch.arange(len(probe.tokens))
        return forward.logits(probe.tokens, probe.positions, packed, rows), replaced(lm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*CONFIGS, *EXTRA])
def test_lean_modules_compute_what_the_models_own_do(name, dtype, monkeypatch):
    lm = build(name, dtype)
    got, kinds = probed(lm)
    assert kinds == expected(name, dtype)
    monkeypatch.setattr(lean, "_suits", lambda lm: False)
    want, kinds = probed(lm)
    assert not kinds
    assert lean.relative_error(got, want) < (2e-6 if dtype == torch.float32 else 2e-2)


def test_the_elementwise_loops_make_the_roundings_of_transformers_modules():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    ops, draw = torch.ops.rlhf_kernels, torch.Generator().manual_seed(0)
    for width in (1, 15, 16, 40, 515):
        x, up = (torch.randn(9, width, generator=draw).bfloat16() for _ in range(2))
        for norm, style in ((LlamaRMSNorm(width, 1e-6), (0.0, True)), (Gemma2RMSNorm(width, 1e-6), (1.0, False))):
            norm.weight.data += 0.1 * torch.randn(width, generator=draw)
            norm.bfloat16()
            difference = ops.rms_norm_rows(x, norm.weight, 1e-6, *style) != norm(x)
            assert difference.float().mean() < 2e-3  # the sum of squares has another order
        gate = x.clone()
        ops.silu_mul(gate, up)
        assert torch.equal(gate, nn.functional.silu(x) * up)
    for d, rotary in ((16, 16), (24, 24), (64, 64)):
        q, k, v = (torch.randn(7, heads, d, generator=draw).bfloat16() for heads in (6, 2, 2))
        angles = torch.randn(7, rotary // 2, generator=draw).repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        want = [y[0].transpose(0, 1) for y in apply_rotary_pos_emb(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])]  # fmt: skip
        keys, values = torch.zeros(2, 3, 2, 5, d).bfloat16()
        slots = torch.randperm(15, generator=draw)[:7]
        ops.rotate_write(q, k, v, cos, sin, keys, values, slots)
        assert torch.equal(q, want[0])
        assert torch.equal(keys[slots // 5, :, slots % 5], want[1])
        assert torch.equal(values[slots // 5, :, slots % 5], v)


def test_a_slot_outside_the_arena_is_an_error_and_nothing_is_written():
    x, cos = torch.ones(2, 1, 4), torch.ones(2, 4)
    keys, values = torch.zeros(2, 1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="slots: out of range"):
        torch.ops.rlhf_kernels.rotate_write(x, x, x, cos, cos, keys, values, torch.tensor([0, 3]))
    assert not keys.any()


def test_nothing_stays_behind_also_after_an_error(monkeypatch):
    lm = build("llama")
    generator = SlicedGenerator(lm, "1MiB")
    stream = generator.stream(prompts([5, 3]), [greedy(max_new_tokens=2), greedy(max_new_tokens=4)])
    next(stream)
    assert not replaced(lm)
    stream.close()

    def failing(*_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("rlhf_kernels.generation.engine._draw", failing)
    with pytest.raises(RuntimeError, match="on fire"):
        generator.generate(prompts([5]), greedy(max_new_tokens=2))
    assert not replaced(lm)


def test_a_module_with_a_hook_keeps_its_forward_and_the_hook_is_called():
    lm, calls = build("llama"), []
    probed(lm)
    handle = lm.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    _, kinds = probed(lm)
    assert len(calls) == 1
    handle.remove()
    assert kinds == {"LlamaDecoderLayer", "LlamaRMSNorm", "Linear"}  # of the other layer
    probed(lm)
    assert len(calls) == 1


def test_a_module_that_does_something_else_keeps_its_forward():
    lm = build("llama")

    class Doubled(type(lm.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + self.up_proj(x)))

    lm.model.layers[0].mlp.__class__ = Doubled
    plan = lean.lean_modules(lm)
    probed(lm)
    kinds = [type(part.module).__name__ for part in plan._parts]
    assert "Doubled" not in kinds
    assert kinds.count("LlamaDecoderLayer") == 1


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_rotation_of_another_kind_is_found_out_also_by_weights_near_zero(scale, monkeypatch):
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_cohere.apply_rotary_pos_emb)
    lm = build("llama")
    for layer in lm.model.layers:
        layer.self_attn.q_proj.weight.data *= scale
    assert probed(lm)[1] == {"LlamaMLP", "LlamaRMSNorm", "Linear"}


def test_weights_that_change_between_rollouts_are_read_anew(monkeypatch):
    lm = build("llama")
    before, _ = probed(lm)
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight += 0.1
        lm.model.layers[1].self_attn.q_proj.weight = nn.Parameter(lm.model.layers[1].self_attn.q_proj.weight * 0.5)
        lm.model.norm.weight *= 2
    got, _ = probed(lm)
    monkeypatch.setattr(lean, "_suits", lambda lm: False)
    assert lean.relative_error(got, probed(lm)[0]) < 2e-6
    assert lean.relative_error(before, got) > 0.1


def test_another_thread_meanwhile_gets_the_models_own_forwards():
    from concurrent.futures import ThreadPoolExecutor

    lm = build("llama", torch.bfloat16)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = lm.lm_head(x)
    with torch.no_grad(), PlainForward(lm).prepared(), ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: lm.lm_head(x)).result()
        assert "forward" in lm.lm_head.__dict__
    assert torch.equal(theirs, want)
    assert theirs.requires_grad  # the lean forward has no gradients


def test_logprobs_equal_those_of_the_models_own_forward(monkeypatch):
    lm, seen = build("qwen3"), record_logits(monkeypatch)
    lists = prompts([9, 1, 14, 30])
    rollouts = SlicedGenerator(lm, "1MiB").generate(lists, greedy(max_new_tokens=12))
    for rollout, prompt in zip(rollouts, lists):
        ids = torch.tensor([prompt + rollout.tokens])
        own = lm(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        want = own.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert (want - torch.tensor(rollout.logprobs)).abs().max() <= 1e-5
    assert seen


def test_a_hydra_models_roles_run_lean_through_their_adapters():
    torch.manual_seed(0)
    model = HydraModel({"base": build("llama")}, adapters={"actor": LoraSpec(r=4), "critic": LoraSpec(r=3)})
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["actor"], std=0.1)
    lists = prompts([9, 1, 14])
    flat, lengths = torch.cat([torch.tensor(tokens) for tokens in lists]), torch.tensor([9, 1, 14], dtype=torch.int32)
    places = torch.cat([torch.arange(n) for n in (9, 1, 14)])
    whole = PackedRows(torch.tensor([0, 9, 10, 24], dtype=torch.int32))
    for role in ("actor", "reference"):
        forward = HydraForward(model, role)
        want = model.decode(role, flat, places, whole, torch.arange(24))
        arena = Arena.from_config(forward.lm, "1MiB", 16)
        slots = torch.cat([torch.arange(n) + 16 * i for i, n in enumerate((9, 1, 14))])
        packed = SlicedRows(arena, slots, torch.arange(3, dtype=torch.int32)[:, None], lengths, whole.cu_seqlens)
        with torch.no_grad(), forward.prepared():
            assert replaced(forward.lm) == LEAN["llama"]
            got = forward.logits(flat, places, packed, torch.arange(24))
        assert lean.relative_error(got, want) < 2e-6
