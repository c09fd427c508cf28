"""A training step with our adapters is PEFT's: from the same state, the same loss and the same gradients, in fp32."""

import copy

import pytest
import torch
from architectures import build

from rlhf_kernels.integrations.peft import accelerate
from rlhf_kernels.nn.lora import LoraSpec, attach_adapters, lora_layers
from rlhf_kernels.ops.lora import Routing

peft = pytest.importorskip("peft")

LOSS, GRADIENTS = 1e-6, 1e-5  # relative
SIZES = {"r": 8, "alpha": 16}
BATCH, TOKENS = 3, 21


def by_peft(model):
    targets = sorted({path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    targets.remove("lm_head")
    config = peft.LoraConfig(r=SIZES["r"], lora_alpha=SIZES["alpha"], target_modules=targets)
    return peft.get_peft_model(model, config)


def step(model, tokens) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients of the adapters by "path.A" and "path.B"."""
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path, _, side = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{path}.{side[0]}"] = parameter.grad
    return float(loss.detach()), found


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_loss_and_gradients_of_a_step_are_those_of_peft(name):
    base = build(name).requires_grad_(False)
    tokens = torch.randint(0, 131, (BATCH, TOKENS))
    theirs = by_peft(copy.deepcopy(base))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)  # B of zeros would leave A without a gradient
    fused = accelerate(copy.deepcopy(theirs))
    ours = copy.deepcopy(base)
    routes = attach_adapters(ours, {"default": LoraSpec(r=SIZES["r"], alpha=SIZES["alpha"])})
    with torch.no_grad():
        for path, layer in lora_layers(ours).items():
            other = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].copy_(other.lora_A["default"].weight)
            layer.lora_B["default"].copy_(other.lora_B["default"].weight)

    loss, gradients = step(theirs, tokens)
    assert len(gradients) == 2 * len(lora_layers(ours)) > 0
    with routes.use(Routing.from_runs([(0, BATCH * TOKENS, 0)], 1)):
        found = {"attach_adapters": step(ours, tokens)}
    found["accelerate"] = step(fused, tokens)
    for who, (own_loss, own) in found.items():
        assert abs(own_loss - loss) <= LOSS * abs(loss), who
        assert own.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert (own[key] - gradient).norm() <= GRADIENTS * gradient.norm(), (who, key)
