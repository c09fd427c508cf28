"""A bad argument of lora_linear, lora_linears or build_routing raises one error that names it, before any work."""

import pytest
import torch
from ops.test_lora import K, N, tensors

from rlhf_kernels.ops.lora import Routing, build_routing, lora_linear, lora_linears

META = {"device": "meta"}
INDEX = torch.zeros(30, dtype=torch.long)

BAD = {
    "x of ints": ({"x": torch.ones(3, K, dtype=torch.long)}, TypeError, "x must be"),
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a floating-point tensor .* not list"),
    "x without dimensions": ({"x": torch.ones(())}, TypeError, "x must be"),
    "weight of other width": ({"weight": torch.ones(N, K + 1)}, ValueError, "weight is"),
    "weight of other dtype": ({"weight": torch.ones(N, K).bfloat16()}, TypeError, "weight is"),
    "weight elsewhere": ({"weight": torch.ones(N, K, **META)}, ValueError, "weight is on meta, x on cpu"),
    "weight no tensor": ({"weight": None}, ValueError, "weight is NoneType"),
    "bias too short": ({"bias": torch.ones(N - 1)}, ValueError, "bias is"),
    "bias of other dtype": ({"bias": torch.ones(N).double()}, TypeError, "bias is"),
    "bias elsewhere": ({"bias": torch.ones(N, **META)}, ValueError, "bias is on meta"),
    "lora_a of other width": ({"lora_a": torch.ones(3, 4, K + 1)}, ValueError, "lora_a of adapter 0"),
    "lora_a of 4 dimensions": ({"lora_a": torch.ones(1, 3, 4, K)}, ValueError, "lora_a is"),
    "lora_a of ints": ({"lora_a": torch.ones(3, 4, K).int()}, TypeError, "lora_a is torch.int32"),
    "lora_a elsewhere": ({"lora_a": torch.ones(3, 4, K, **META)}, ValueError, "lora_a is on meta"),
    "lora_a no tensors": ({"lora_a": ["a", "b", "c"]}, TypeError, "lora_a must be a tensor or a sequence"),
    "a lora_a of 3 dimensions": ({"lora_a": [torch.ones(1, 4, K)] * 3}, ValueError, "lora_a of adapter 0"),
    "lora_b of other rank": ({"lora_b": torch.ones(3, N, 5)}, ValueError, "lora_b of adapter 0"),
    "lora_b transposed": ({"lora_b": torch.ones(3, 4, N)}, ValueError, "lora_b of adapter 0"),
    "lora_b elsewhere": ({"lora_b": torch.ones(3, N, 4, **META)}, ValueError, "lora_b is on meta"),
    "adapters disagree": ({"lora_b": torch.ones(2, N, 4)}, ValueError, "lora_a has 3 adapters, lora_b 2"),
    "no index": ({"adapter_index": None}, ValueError, "adapter_index is None with 3"),
    "float index": ({"adapter_index": torch.ones(30)}, TypeError, "adapter_index is torch.float32"),
    "bool index": ({"adapter_index": INDEX.bool()}, TypeError, "adapter_index is torch.bool"),
    "complex index": ({"adapter_index": INDEX.to(torch.complex64)}, TypeError, "adapter_index is torch.complex64"),
    "index of a bool": ({"adapter_index": True}, TypeError, "adapter_index is bool"),
    "list index": ({"adapter_index": [0] * 30}, TypeError, "adapter_index is list"),
    "index of other shape": ({"adapter_index": INDEX[:29]}, ValueError, "adapter_index is"),
    "index of x's shape": ({"adapter_index": torch.zeros(30, K).long()}, ValueError, "adapter_index is"),
    "index elsewhere": ({"adapter_index": INDEX.to("meta")}, ValueError, "adapter_index is on meta"),
    "index too large": ({"adapter_index": INDEX + 3}, IndexError, "adapter_index holds 3"),
    "one index too small": ({"adapter_index": INDEX.scatter(0, torch.tensor([9]), -2)}, IndexError, "holds -2"),
    "int too small": ({"adapter_index": -2}, IndexError, "adapter_index is -2"),
    "int too large": ({"adapter_index": 3}, IndexError, "adapter_index is 3"),
    "scaling too short": ({"scaling": torch.ones(2)}, ValueError, "scaling is"),
    "scaling list too short": ({"scaling": [1.0]}, ValueError, "scaling has 1 entries"),
    "scaling of 2 dimensions": ({"scaling": torch.ones(3, 1)}, ValueError, "scaling is"),
    "scaling elsewhere": ({"scaling": torch.ones(3, **META)}, ValueError, "scaling is on meta"),
    "scaling no number": ({"scaling": "2"}, TypeError, "scaling is str"),
    "scaling that learns": ({"scaling": torch.ones(3, requires_grad=True)}, ValueError, "scaling requires a gradient"),
    "rank too large": ({"ranks": [4, 5, 1]}, ValueError, r"ranks\[1\] is 5"),
    "rank below zero": ({"ranks": torch.tensor([4, 4, -1])}, ValueError, r"ranks\[2\] is -1"),
    "rank of a float": ({"ranks": [4, 2.0, 1]}, ValueError, r"ranks\[1\] is 2.0"),
    "ranks of floats": ({"ranks": torch.ones(3)}, TypeError, "ranks is torch.float32"),
    "ranks one int": ({"ranks": 4}, TypeError, "ranks is int"),
    "ranks without dimensions": ({"ranks": torch.tensor(4)}, ValueError, "ranks is"),
    "too few ranks": ({"ranks": [4, 4]}, ValueError, "ranks has 2 entries"),
    "grad_rows too large": ({"grad_rows": 31}, ValueError, "grad_rows is 31"),
    "grad_rows below zero": ({"grad_rows": -1}, ValueError, "grad_rows is -1"),
    "grad_rows of a float": ({"grad_rows": 3.0}, ValueError, "grad_rows is 3.0"),
    "routing no routing": ({"routing": INDEX}, TypeError, "routing is torch.int64"),
    "routing elsewhere": ({"routing": Routing(3, 30, INDEX.to("meta"))}, ValueError, "routing is on meta"),
    "routing of other adapters": (
        {"routing": Routing.from_runs([(0, 30, 0)], adapters=2)}, ValueError, "routing was built for 2 adapters",
    ),
    "routing of other rows": (
        {"routing": Routing.from_runs([(0, 29, 0)], adapters=3)}, ValueError, "routing was built for 29 rows",
    ),
    "routing of no rows": ({"routing": Routing.from_runs([], adapters=3)}, ValueError, "routing was built for 0 rows"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["", "naive"], ids=["chosen", "naive"])
@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(change, error, message, backend, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    x, weight, a, b, bias = tensors()
    good = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "adapter_index": 0, "bias": bias}
    with pytest.raises(error, match=message):
        lora_linear(**(good | change))


MANY = {
    "weights no list": ({"weights": torch.ones(2, N, K)}, TypeError, "weights must be a sequence"),
    "no weights": ({"weights": []}, TypeError, "weights must be a sequence of at least one"),
    "one lora_a": ({"lora_a": [torch.ones(3, 4, K)]}, ValueError, "lora_a has 1 entries, weights 2"),
    "lora_a no list": ({"lora_a": torch.ones(2, 4, K)}, TypeError, "lora_a must be a sequence of 2"),
    "three lora_b": ({"lora_b": [torch.ones(3, N, 4)] * 3}, ValueError, "lora_b has 3 entries, weights 2"),
    "one bias": ({"biases": [None]}, ValueError, "biases has 1 entries, weights 2"),
    "a wrong weight": ({"weights": [torch.ones(N, K), torch.ones(N, 1)]}, ValueError, r"weights\[1\] is"),
    "a wrong bias": ({"biases": [None, torch.ones(1)]}, ValueError, r"biases\[1\] is"),
    "a wrong adapter": (
        {"lora_a": [torch.ones(3, 4, K), torch.ones(3, 5, K)]}, ValueError, r"lora_b\[1\] of adapter 0 is",
    ),
    "adapters disagree": (
        {"lora_a": [torch.ones(3, 4, K), torch.ones(2, 4, K)], "lora_b": [torch.ones(3, N, 4), torch.ones(2, N, 4)]},
        ValueError, r"lora_a\[1\] has 2 adapters, lora_a\[0\] 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), MANY.values(), ids=MANY.keys())
def test_a_bad_list_of_projections_is_named(change, error, message):
    x, weight, a, b, _ = tensors()
    good = {"x": x, "weights": [weight, weight], "lora_a": [a, a], "lora_b": [b, b], "adapter_index": 0}
    with pytest.raises(error, match=message):
        lora_linears(**(good | change))


def test_build_routing_names_what_is_wrong():
    with pytest.raises(IndexError, match=r"adapter_index holds 2; with 2 adapters it must lie in \[-1, 1\]"):
        build_routing(torch.tensor([0, 2]), 2)
    with pytest.raises(TypeError, match=r"adapter_index is torch\.float32"):
        build_routing(torch.ones(2), 2)
    with pytest.raises(TypeError, match="adapter_index is list"):
        build_routing([0, 1], 2)
    with pytest.raises(ValueError, match="n is -1"):
        build_routing(torch.tensor([0]), -1)


@pytest.mark.parametrize(
    "runs", [[(0, 3, 0), (4, 5, 1)], [(1, 3, 0)], [(0, 3, 2)], [(0, 3, -2)], [(0, 3, 0), (3, 2, 0)]]
)
def test_runs_with_a_gap_or_an_adapter_too_many_are_refused(runs):
    with pytest.raises(ValueError, match="leaves a gap or names no adapter of 2"):
        Routing.from_runs(runs, adapters=2)


@pytest.mark.parametrize("rows", [30, 300], ids=["short", "long"])
@pytest.mark.parametrize("scattered", [False, True], ids=["runs", "scattered"])
def test_an_index_outside_is_an_error_on_the_cpu_in_any_order_of_rows(rows, scattered):
    x, weight, a, b, _ = tensors(rows=rows)
    index = torch.arange(rows) % 3 if scattered else torch.arange(rows) * 3 // rows
    for bad in (3, -2):
        index[rows // 2] = bad
        with pytest.raises(IndexError, match=f"adapter_index holds {bad}"):
            lora_linear(x, weight, a, b, index)
