"""Gated MLPs keep less for the backward, and give the same bits as without."""

from contextlib import nullcontext

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_kernels.nn import HydraModel, LoraSpec, forward
from rlhf_kernels.nn.gated import frugal_mlps

LENGTHS = [5, 9, 3]
TOKENS = torch.randint(0, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
WIDTH = 112  # of gate and up


def llama(dtype=torch.float32, activation="silu"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, hidden_act=activation,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def hydra(train_base=False, **options):
    model = HydraModel({"base": llama(**options)}, {n: LoraSpec(4) for n in ("actor", "critic")}, train_base=train_base)
    torch.manual_seed(2)
    for role in ("actor", "critic"):
        for parameter in model.trainable_parameters(role):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def learned(model):
    """Outputs and gradients of one loss, and the shapes of what its forward kept for the backward."""
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(TOKENS, LENGTHS, prompt_lengths=[1, 2, 1])
    (out["actor"].logprob.sum() + (out["critic"].value ** 2).sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wide = [t for t in kept.values() if t.shape[-1] == WIDTH and t.shape[-2:] != (32, WIDTH) and t.numel() > 40 * WIDTH]
    return out, found, len(wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("train_base", [False, True], ids=["frozen", "trained"])
def test_gradients_are_the_same_to_the_bit(dtype, train_base, monkeypatch):
    out, found, _ = learned(hydra(train_base, dtype=dtype))
    monkeypatch.setattr(forward, "frugal_mlps", lambda model: nullcontext())
    plain, wanted, _ = learned(hydra(train_base, dtype=dtype))
    assert torch.equal(out["actor"].logprob, plain["actor"].logprob)
    assert found.keys() == wanted.keys()
    assert any("gate_proj" in name for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_layer_keeps_gate_and_up_alone(monkeypatch):
    inside = learned(hydra())[2]
    monkeypatch.setattr(forward, "frugal_mlps", lambda model: nullcontext())
    assert learned(hydra())[2] - inside >= 2  # what is made of them was kept besides, at least once a layer


def test_another_activation_and_a_changed_forward_are_left_alone():
    for model in (llama(activation="gelu"), llama()):
        mlp = model.model.layers[0].mlp
        if type(mlp.act_fn).__name__.startswith("SiLU"):
            mlp.forward = lambda x: x
        before = mlp.__dict__.get("forward")
        with frugal_mlps(model):
            assert mlp.__dict__.get("forward") is before


def test_nothing_is_left_behind_nor_done_without_gradients_or_with_checkpointing():
    model = llama()
    mlp = model.model.layers[0].mlp
    with frugal_mlps(model):
        assert "forward" in mlp.__dict__
    assert "forward" not in mlp.__dict__
    with torch.no_grad(), frugal_mlps(model):
        assert "forward" not in mlp.__dict__
    wrapped = hydra()
    wrapped.gradient_checkpointing_enable()
    with frugal_mlps(wrapped.decoder("base")):
        assert "forward" not in wrapped.decoder("base").model.layers[0].mlp.__dict__
