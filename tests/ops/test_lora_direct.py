"""The short way of lora_linear, for calls that need no gradient: the same bits and the same errors as the long one."""

import pytest
import torch

from rlhf_kernels import build_routing, lora_linear
from rlhf_kernels.ops.lora import api, tiles

K, N, R, ADAPTERS = 96, 80, 4, 2

pytestmark = pytest.mark.skipif(torch.bfloat16 not in tiles.DTYPES, reason="the CPU has no bf16 unit")


class Case:
    def __init__(self, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(rows)
        self.x, self.w, self.bias = (torch.randn(*size).to(dtype) for size in ((rows, K), (N, K), (N,)))
        self.a = [torch.randn(R, K).to(dtype) for _ in range(ADAPTERS)]
        self.b = [torch.randn(N, R).to(dtype).requires_grad_() for _ in range(ADAPTERS)]
        self.index = (torch.arange(rows) * (ADAPTERS + 1)) // rows - 1
        self.routing = build_routing(self.index, ADAPTERS)

    @torch.no_grad()
    def run(self, **long_way):
        return lora_linear(self.x, self.w, self.a, self.b, None, 0.5, self.bias, routing=self.routing, **long_way)


@pytest.fixture
def no_long_way(monkeypatch):
    def taken(*_):
        raise AssertionError("the long way was taken")

    monkeypatch.setattr(api, "_projections", taken)


@pytest.mark.parametrize("rows", [1, 5, 12, 25, 48, 100, 193])
@pytest.mark.parametrize("dtype", [t for t in (torch.bfloat16, torch.float32, torch.float16) if t in tiles.DTYPES])
def test_the_short_way_has_the_bits_of_the_long_one(rows, dtype):
    case = Case(rows, dtype)
    assert torch.equal(case.run(), case.run(ranks=[R] * ADAPTERS))


def test_it_needs_no_check_in_python(no_long_way):
    assert Case(12).run().shape == (12, N)


def test_a_call_that_may_need_gradients_goes_the_long_way(no_long_way):
    case = Case(12)
    with pytest.raises(AssertionError, match="long way"), torch.enable_grad():
        lora_linear(case.x, case.w, case.a, case.b, None, 0.5, routing=case.routing)


def test_another_backend_goes_the_long_way(no_long_way, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "naive")
    with pytest.raises(AssertionError, match="long way"):
        Case(12).run()


def test_an_index_overwritten_in_place_is_seen():
    case = Case(12)
    case.index.fill_(-1)
    assert torch.equal(case.run(), case.run(ranks=[0, 0]))


def test_an_index_that_names_no_adapter_is_an_error():
    case = Case(12)
    case.index[3] = ADAPTERS
    with pytest.raises(IndexError, match="adapter_index holds 2"):
        case.run()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("w", torch.zeros(N, K + 1, dtype=torch.bfloat16), ValueError, "weight is"),
        ("w", torch.zeros(N, K), TypeError, "weight is"),
        ("x", torch.zeros(11, K, dtype=torch.bfloat16), ValueError, "routing was built for 12 rows"),
        ("bias", torch.zeros(N + 1, dtype=torch.bfloat16), ValueError, "bias is"),
        ("a", [torch.zeros(R, K)], ValueError, "lora_a has 1 adapters"),
        ("a", [torch.zeros(R, K + 1)] * ADAPTERS, ValueError, "lora_a of adapter 0"),
        ("b", [torch.zeros(N, R + 1)] * ADAPTERS, ValueError, "lora_b of adapter 0"),
        ("b", [torch.zeros(N, R), None], TypeError, "lora_b must be"),
        ("a", [torch.zeros(R, K, dtype=torch.int64)] * ADAPTERS, TypeError, "lora_a is"),
    ],
)
def test_what_the_kernels_refuse_is_named_as_ever(name, value, error, message):
    case = Case(12)
    setattr(case, name, value)
    with pytest.raises(error, match=message):
        case.run()
