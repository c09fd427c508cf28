"""A LoRA linear, forward and backward, and three roles in one call: ours beside PEFT's layer and the bare linear."""

import torch
from torch import nn

from benchmarks.runner import Case
from rlhf_kernels import build_routing, lora_linear


def peft_layer(base: nn.Linear, names: list[str], r: int) -> nn.Module:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layer = Linear(base, names[0], config=LoraConfig(r=r, lora_alpha=r, init_lora_weights=False), r=r, lora_alpha=r)
    for name in names[1:]:
        config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=False)
        layer.update_layer(name, r, lora_alpha=r, config=config)
    return layer


def one_adapter(rows: int, width: int, r: int) -> Case:
    torch.manual_seed(0)
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    a, b = torch.randn(1, r, width, requires_grad=True), torch.randn(1, width, r, requires_grad=True)
    x = torch.randn(rows, width, requires_grad=True)
    theirs = peft_layer(base, ["one"], r)

    contestants = {
        "frozen linear": lambda: base(x).sum().backward(),
        "peft": lambda: theirs(x).sum().backward(),
        "rlhf_kernels": lambda: lora_linear(x, base.weight, a, b).sum().backward(),
    }
    return Case(f"fwd+bwd {rows} x {width} r={r} fp32", contestants, base="frozen linear")


@torch.no_grad()
def three_roles(rows: int, width: int, r: int) -> Case:
    torch.manual_seed(0)
    base = nn.Linear(width, width, bias=False)
    a, b = torch.randn(2, r, width), torch.randn(2, width, r)
    x = torch.randn(3 * rows, width)
    index = torch.tensor([0, 1, -1]).repeat_interleave(rows)
    routing = build_routing(index, 2)
    theirs = peft_layer(base, ["actor", "critic"], r)

    def three_passes() -> None:
        with torch.no_grad():
            theirs.set_adapter("actor")
            theirs(x[:rows])
            theirs.set_adapter("critic")
            theirs(x[rows : 2 * rows])
            base(x[2 * rows :])

    def one_call() -> None:
        with torch.no_grad():
            lora_linear(x, base.weight, a, b, index, routing=routing)

    return Case(f"three roles, {rows} rows each", {"peft": three_passes, "rlhf_kernels": one_call}, base="peft")


def cases() -> list[Case]:
    return [one_adapter(1024, 1024, 16), *(three_roles(rows, 1024, 16) for rows in (1024, 16, 4))]
