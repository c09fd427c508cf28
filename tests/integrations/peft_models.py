"""Small PEFT models, the same beside them accelerated, and what a run of one gives."""

import pytest
import torch
from architectures import build
from torch import nn

from rlhf_kernels.integrations.peft import accelerate, accelerated

peft = pytest.importorskip("peft")

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


WEIGHT = torch.linspace(-1, 1, 4 * 6 * 131).view(4, 6, 131)


def run(model, weight=WEIGHT, **inputs):
    """Logits and the gradients of every parameter that has one."""
    logits = model(input_ids=IDS, **inputs).logits
    if logits.requires_grad:
        (logits * weight).sum().backward()
    return logits.detach(), grads(model)


def grads(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.count_nonzero())}
    model.zero_grad()
    return found


def same(mine, peft_own):
    """Logits and gradients of two runs, but for fp32's rounding."""
    assert distance(mine[0], peft_own[0]) < 3e-6
    assert mine[1].keys() == peft_own[1].keys()
    for name, grad in peft_own[1].items():
        assert distance(mine[1][name], grad) < 1e-5, name


def distance(got, want):
    return float((got - want).norm() / want.norm())
