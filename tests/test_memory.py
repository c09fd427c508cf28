"""The plan's static bytes against live tensors, and its budget arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from rlhf_kernels.memory import LAYOUTS, adapter_parameters, comparison, meta_model, plan
from rlhf_kernels.memory_layouts import Base, Part
from rlhf_kernels.nn import HydraModel, LoraSpec, Role


def llama(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=72, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)


def live_bytes(model: nn.Module, head: nn.Linear | None, trained: bool) -> int:
    """Bytes of weights, gradients, masters and AdamW state after one real step (through the scalar head, if given)."""
    parameters = [*model.parameters(), *(head.parameters() if head else ())]
    if not trained:
        return sum(p.nbytes for p in parameters)
    ids = torch.arange(6)[None]
    if head is None:
        model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    else:
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        head(hidden.float()).sum().backward()
    masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    for master, p in zip(masters, parameters):
        if master is not p:
            master.grad = None if p.grad is None else p.grad.float()
    adam = torch.optim.AdamW(masters)
    adam.step()
    state = sum(t.nbytes for s in adam.state.values() for t in s.values())
    copies = sum(m.nbytes for m, p in zip(masters, parameters) if m is not p)
    return sum(p.nbytes for p in parameters) + gradients + state + copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [llama(), llama(tied=True), gpt2()], ids=["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("algorithm", ["sft", "reward", "ppo", "remax"])
def test_static_bytes_of_full_training_equal_the_live_tensors(algorithm, config, dtype):
    total = 0
    layout = LAYOUTS[algorithm]
    for name, base in layout.base_names().items():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        head = nn.Linear(32, 1, bias=False) if base.trained and not layout.reads_vocabulary(name) else None
        total += live_bytes(model, head, base.trained)
    total += sum(4 * 32 for trained in layout.heads.values() if not trained)
    assert plan(config, algorithm, dtype=dtype).static == total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all-linear", "q-v"])
@pytest.mark.parametrize("algorithm", ["lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_static_bytes_of_adapters_equal_the_parameters_peft_makes(algorithm, targets, dtype):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_config(llama(), dtype=getattr(torch, dtype))
    frozen = sum(p.nbytes for p in base.parameters())
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    lora = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    adapter = sum(p.numel() * 16 + 4 for p in lora)  # fp32 weight, gradient, two moments, and AdamW's step
    layout = LAYOUTS[algorithm]
    heads = sum(16 * 32 + 4 if trained else 4 * 32 for trained in layout.heads.values())
    want = len(layout.bases) * frozen + len(layout.adapters) * adapter + heads
    assert plan(llama(), algorithm, lora_rank=4, target_modules=targets, dtype=dtype).static == want


def test_adapters_follow_the_shapes_of_conv1d_too():
    rank, hidden, inner = 4, 32, 128
    shapes = [
        (hidden, 3 * hidden),
        (hidden, hidden),
        (hidden, inner),
        (inner, hidden),
    ]  # attention in, out; mlp in, out
    want = 2 * sum(rank * (k + n) for k, n in shapes)
    assert sum(t.numel() for t in adapter_parameters(meta_model(gpt2(), "float32"), rank)) == want


@pytest.mark.parametrize(
    ("algorithm", "dtype", "bytes_a_parameter"),
    [
        ("ppo", "bfloat16", 36),
        ("remax", "bfloat16", 20),
        ("sft", "bfloat16", 16),
        ("lora-ppo", "bfloat16", 8),
        ("ppo", "float32", 40),
        ("remax", "float32", 24),
    ],
)
def test_bytes_a_parameter_are_those_of_the_papers(algorithm, dtype, bytes_a_parameter):
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2752, num_hidden_layers=16, num_attention_heads=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    one = plan(config, algorithm, dtype=dtype, lora_rank=1)
    assert one.static / one.parameters == pytest.approx(bytes_a_parameter, rel=0.02)


def test_base_copies_and_adapters_are_those_of_the_table():
    copies = {name: (len(LAYOUTS[name].bases), len(LAYOUTS[name].adapters)) for name in LAYOUTS}
    assert copies["ppo"] == (4, 0)
    assert copies["lora-ppo"] == (4, 2)
    assert copies["j-hydra-ppo"] == (1, 1)
    assert copies["hydra-ppo"] == (1, 2)
    assert copies["remax"] == (3, 0)


@pytest.mark.parametrize(("algorithm", "head"), [("ppo", 4 * 32), ("lora-ppo", 4 * 32), ("remax", 0)])
def test_a_reward_function_saves_one_copy(algorithm, head):
    whole, less = plan(llama(), algorithm), plan(llama(), algorithm, reward_model=False)
    weights = sum(p.nbytes for p in AutoModelForCausalLM.from_config(llama(), dtype=torch.bfloat16).parameters())
    assert whole.static - less.static == weights + head


def test_the_arena_holds_the_whole_batch_unless_its_bytes_are_given():
    def arena(**kwargs):
        rows = plan(llama(), batch=3, prompt=5, response=7, **kwargs).rows
        return next(r.bytes for r in rows if r.name == "KV arena")

    per_token = 2 * 2 * 2 * 8 * 2  # layers, keys and values, kv heads, head dim, bytes of bf16
    assert arena() == 3 * (5 + 7) * per_token
    assert arena(kv_memory="1MiB") == 2**20


def test_the_largest_batch_fits_the_budget_and_the_next_one_does_not():
    best = plan(llama(), "hydra-ppo", budget="64MiB").largest_batch
    assert best is not None
    assert best >= 1
    assert plan(llama(), "hydra-ppo", batch=best).total <= 2**26 < plan(llama(), "hydra-ppo", batch=best + 1).total
    assert plan(llama(), "ppo", budget=1000).largest_batch == 0
    assert plan(llama(), "ppo").largest_batch is None


HIDDEN, VOCABULARY = 64, 160
ARCHITECTURES = {
    "llama": LlamaConfig(hidden_size=HIDDEN, num_key_value_heads=2),
    "llama tied": LlamaConfig(hidden_size=HIDDEN, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": Qwen2Config(hidden_size=HIDDEN, num_key_value_heads=2),
    "mistral": MistralConfig(hidden_size=HIDDEN, num_key_value_heads=1, sliding_window=8),
    "gemma2": Gemma2Config(hidden_size=HIDDEN, num_key_value_heads=2, head_dim=32),
    "gpt2": GPT2Config(n_embd=HIDDEN),
    "gpt-neox": GPTNeoXConfig(hidden_size=HIDDEN),
}
for _config in ARCHITECTURES.values():
    for _name, _value in {
        "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": VOCABULARY, "intermediate_size": 96,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }.items():  # fmt: skip
        setattr(_config, _name, _value)
    if getattr(_config, "layer_types", None):
        _config.layer_types = (_config.layer_types * 6)[:6]


def saved_bytes(config, dtype: torch.dtype, adapters: bool) -> int:
    """What autograd keeps of a forward of the actor and the critic on the CPU, each storage once, weights apart."""
    torch.manual_seed(0)
    names = ("actor", "critic") if adapters else ()
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    roles = {"actor": Role("actor" if adapters else None), "critic": Role("critic" if adapters else None, "value")}
    model = HydraModel({"base": base}, {name: LoraSpec(r=4) for name in names}, roles, train_base=not adapters)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(torch.zeros(64, dtype=torch.long), [16] * 4, roles=("actor", "critic"), prompt_lengths=[8] * 4)
    assert out["actor"].logprob.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activations_are_what_autograd_keeps(name, dtype, adapters):
    config = ARCHITECTURES[name]
    layout = LAYOUTS["hydra-ppo"]
    if not adapters:
        roles = {"actor": Part(), "critic": Part(head="value")}
        layout = replace(layout, bases=(Base("base", trained=True),), roles=roles, scored=("actor", "critic"))
    planned = plan(config, layout=layout, batch=4, prompt=8, response=8, lora_rank=4, dtype=dtype).rows
    activations = next(r.bytes for r in planned if r.name == "activations")
    assert activations == pytest.approx(saved_bytes(config, dtype, adapters), rel=0.03)


def test_checkpointing_lowers_the_estimate_of_activations():
    def activations(**kwargs):
        return next(r.bytes for r in plan(llama(), **kwargs).rows if r.name == "activations")

    assert activations(gradient_checkpointing=True) < activations()


def test_the_table_marks_estimates_and_shows_every_part():
    table = plan(llama(), "hydra-ppo", budget="1GiB").table()
    for part in ("shared base", "actor adapter", "critic adapter", "KV arena", "static", "the peak", "largest batch"):
        assert part in table
    activations = next(line for line in table.splitlines() if line.startswith("  activations"))
    assert "~" in activations
    assert "~" not in next(line for line in table.splitlines() if line.startswith("  KV arena"))
    assert len(comparison(llama()).splitlines()) == 3 + len(LAYOUTS)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"algorithm": "dpo2"}, "algorithm: 'dpo2' is not one of"),
        ({"dtype": "int8"}, "dtype: 'int8' is not float32 or bfloat16"),
        ({"optimizer": "lion"}, "optimizer: 'lion' is not one of adamw, sgd"),
        ({"batch": 0}, "batch: must be a whole number of at least 1, got 0"),
        ({"lora_rank": 1.5}, "lora_rank: must be a whole number"),
        ({"budget": "lots"}, "'lots'"),
        ({"config_or_path": "/no/such/dir"}, "config_or_path: '/no/such/dir' does not exist"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_wrong_argument_is_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        plan(**{"config_or_path": llama(), **kwargs})
