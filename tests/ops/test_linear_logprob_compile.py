"""linear_logprob as a registered op: opcheck, and torch.compile in one graph."""

import shutil

import pytest
import torch

from rlhf_kernels.ops.logprob import linear_logprob, op

pytestmark = pytest.mark.usefixtures("device")


def op_arguments(save: str, grads: str, train: bool = False) -> tuple:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=train)
    target = torch.tensor([0, 3, -100, 19, 7])
    bias, reference = torch.randn(20, requires_grad=train), torch.randn(5, 8)
    a, b = torch.randn(2, 3, 8, requires_grad=train), torch.randn(2, 20, 3, requires_grad=train)
    index, scaling = torch.tensor([0, 1, -1, 0, 1]), torch.ones(2)
    return (
        hidden, weight, target, bias, torch.rand(5) + 0.5, reference, None, a, b, index, scaling, 1.0, 5.0, 1.2, -100,
        "logprob,lse,entropy,ref_logprob,kl,rkl,js", grads, save, -1, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("save", "grads", "train"),
    [
        ("none", "", False),
        ("grad_vector", "logprob", False),
        ("grad_vector", "logprob,js", False),
        ("recompute", "logprob,entropy,kl", True),
        ("logits", "logprob,rkl", True),
    ],
)
def test_opcheck(save, grads, train):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if save != "none" else []
    torch.library.opcheck(op.forward, op_arguments(save, grads, train), test_utils=checks)


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")),
]


@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_in_one_graph_with_dynamic_rows(backend, train):
    def loss(hidden, weight, reference, target):
        out = linear_logprob(
            hidden, weight, target, ref_hidden=reference, entropy=True, divergence=("kl", "k3"), temperature=0.7,
            grad_fields=("logprob", "k3", "entropy"),
        )  # fmt: skip
        return (out.logprob + 0.1 * out.k3 - 0.01 * out.entropy).sum() + out.kl.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (6, 9, 70):
        x = [torch.randn(rows, 12, requires_grad=True), torch.randn(30, 12, requires_grad=train), torch.randn(rows, 12)]
        y = torch.randint(30, (rows,))
        y[1] = -100
        eager = loss(*x, y)
        wanted = torch.autograd.grad(eager, x[: 1 + train])
        with torch.compiler.set_stance("default" if rows == 6 else "fail_on_recompile"):
            result = compiled(*x, y)
        found = torch.autograd.grad(result, x[: 1 + train])
        assert torch.allclose(eager, result)
        for a, b in zip(wanted, found):
            assert torch.allclose(a, b, atol=1e-6)


OPTIONS = {
    "softcap and scale": {"softcap": 4.0, "logit_scale": 0.5},
    "saved logits": {"save": "logits"},
    "per-row temperature": {"per row": True},
    "adapters by row": {"lora": "tensor"},
    "one adapter": {"lora": 1},
    "bypassed adapters": {"lora": -1},
    "a known count": {"valid_rows": 7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_compiles_in_one_graph(options):
    options = dict(options)
    if options.pop("per row", False):
        options["temperature"] = torch.rand(7) + 0.5
    if "lora" in options:
        index = torch.tensor([0, 1, -1, 0, 1, 1, 0]) if options["lora"] == "tensor" else options["lora"]
        options["lora"] = (
            torch.randn(2, 3, 12, requires_grad=True),
            torch.randn(2, 30, 3, requires_grad=True),
            index,
            0.5,
        )

    def loss(hidden, weight, target):
        out = linear_logprob(hidden, weight, target, entropy=True, grad_fields=("logprob", "entropy"), **options)
        return (out.logprob + 0.1 * out.entropy).sum()

    x = [torch.randn(7, 12, requires_grad=True), torch.randn(30, 12, requires_grad=True)]
    x += [] if "lora" not in options else [*options["lora"][:2]]
    y = torch.randint(30, (7,))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*x[:2], y), x)
    for a, b in zip(torch.autograd.grad(loss(*x[:2], y), x), found):
        assert torch.allclose(a, b, atol=1e-6)
