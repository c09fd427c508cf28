"""A LoRA linear, forward and backward, and three roles in one call: ours beside PEFT's layer and the bare linear."""

from typing import Any

import torch
from torch import nn

from benchmarks.case import OURS, Case, Prepare, Run, ready
from benchmarks.peers import attribute
from rlhf_kernels import build_routing, lora_linear

TINY = 16


def peft_layer(base: nn.Linear, names: list[str], r: int) -> Any:
    """PEFT's wrapped linear with these adapters; Unavailable where PEFT is not installed."""
    config_class, linear_class = attribute("peft", "LoraConfig"), attribute("peft.tuners.lora", "Linear")
    config = config_class(r=r, lora_alpha=r, init_lora_weights=False)
    layer = linear_class(base, names[0], config=config, r=r, lora_alpha=r)
    for name in names[1:]:
        layer.update_layer(name, r, lora_alpha=r, config=config)
    return layer.to(base.weight.device)


def one_adapter(rows: int, width: int, r: int, device: str) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        torch.manual_seed(0)
        k, n = (TINY, TINY) if tiny else (width, rows)
        base = nn.Linear(k, k, bias=False, device=device).requires_grad_(False)
        a = torch.randn(1, r, k, device=device, requires_grad=True)
        b = torch.randn(1, k, r, device=device, requires_grad=True)
        x = torch.randn(n, k, device=device, requires_grad=True)

        def theirs() -> Run:
            layer = peft_layer(base, ["one"], r)
            return lambda: layer(x).sum().backward()

        return {
            "frozen linear": ready(lambda: base(x).sum().backward()),
            "peft": theirs,
            OURS: ready(lambda: lora_linear(x, base.weight, a, b).sum().backward()),
        }

    return Case(f"fwd+bwd {rows} x {width} r={r} fp32", build, "frozen linear")


def three_roles(rows: int, width: int, r: int, device: str) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        torch.manual_seed(0)
        k, n = (TINY, TINY) if tiny else (width, rows)
        base = nn.Linear(k, k, bias=False, device=device).requires_grad_(False)
        a, b = torch.randn(2, r, k, device=device), torch.randn(2, k, r, device=device)
        x = torch.randn(3 * n, k, device=device)
        index = torch.tensor([0, 1, -1], device=device).repeat_interleave(n)
        routing = build_routing(index, 2)

        def theirs() -> Run:
            layer = peft_layer(base, ["actor", "critic"], r)

            @torch.no_grad()
            def three_passes() -> None:
                layer.set_adapter("actor")
                layer(x[:n])
                layer.set_adapter("critic")
                layer(x[n : 2 * n])
                base(x[2 * n :])

            return three_passes

        @torch.no_grad()
        def one_call() -> None:
            lora_linear(x, base.weight, a, b, index, routing=routing)

        return {"peft": theirs, OURS: ready(one_call)}

    return Case(f"three roles, {rows} rows each", build, "peft")


def cases(device: str = "cpu") -> list[Case]:
    return [one_adapter(1024, 1024, 16, device), *(three_roles(rows, 1024, 16, device) for rows in (1024, 16, 4))]
