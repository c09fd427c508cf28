"""`sample`: the same token from every backend, the right distribution after each filter, the logprob of training."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.sampling import sample
from rlhf_kernels.ops.sampling.api import _sample
from rlhf_kernels.ops.sampling.naive import exp_weight, fixed_point
from rlhf_kernels.ops.sampling.philox import philox4x32, uniform

pytestmark = pytest.mark.usefixtures("device")

INF = float("inf")
BACKENDS = [
    "naive",
    pytest.param("native", marks=pytest.mark.skipif(not registry.native_available(), reason="not built")),
]
KEYS = {"seed": 1, "stream": 2, "position": 3}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", request.param)
    return request.param


def draws(logits: Tensor, n: int = 20000, **parameters: object) -> Tensor:
    """Token of each of n draws from one row of logits."""
    return sample(logits.expand(n, -1), seed=5, stream=7, position=torch.arange(n), **parameters)[0]


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Standardised chi-square of the counts against probabilities p: about N(0, 1) where they agree."""
    assert p[tokens].min() > 0, "a token of probability 0 was drawn"
    expected = p[p > 0] * tokens.numel()
    counts = torch.bincount(tokens, minlength=p.numel())[p > 0]
    freedom = expected.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def mixed_rows(n: int, v: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits with ties, -inf and flat to peaked rows, and a different set of parameters in each row."""
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def rand() -> Tensor:
        return torch.rand(n, generator=g)

    logits = torch.randn(n, v, generator=g) * rand()[:, None] * 8
    logits = torch.where(rand()[:, None] < 0.3, logits.round(), logits)
    logits = logits.masked_fill(torch.rand(n, v, generator=g) < 0.05, -INF)
    return logits, {
        "temperature": torch.where(rand() < 0.2, 0.0, rand() * 2),
        "top_k": torch.where(rand() < 0.4, 0, (rand() * min(2 * v, 60)).long()),
        "top_p": torch.where(rand() < 0.4, 1.0, rand()),
        "min_p": torch.where(rand() < 0.5, 0.0, rand() * 0.3),
        "seed": torch.randint(-(2**62), 2**62, (n,), generator=g),
        "stream": torch.randint(-(2**62), 2**62, (n,), generator=g),
        "sample_index": torch.randint(0, 100, (n,), generator=g),
        "position": torch.randint(0, 2**32, (n,), generator=g),
        "greedy": rand() < 0.1,
    }


# ---- random numbers ----


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter: tuple, key: tuple, expected: tuple) -> None:
    out = philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(x) for x in out) == expected


@pytest.mark.parametrize("name", ["seed", "stream", "sample_index", "position"])
@pytest.mark.parametrize("bit", [0, 31, 32, 62])
def test_every_bit_of_the_key_changes_the_draws(name: str, bit: int) -> None:
    if name in ("sample_index", "position") and bit > 31:
        pytest.skip("32 bits wide")
    zeros = {n: torch.zeros(1, dtype=torch.int64) for n in ("seed", "stream", "sample_index", "position")}
    assert uniform(**zeros) != uniform(**{**zeros, name: torch.tensor([1 << bit])})


def test_uniform_draws_fill_the_unit_interval_evenly() -> None:
    i = torch.arange(100000)
    u = uniform(torch.zeros_like(i), i % 10, i % 7, i)
    counts = torch.histc(u, 100, 0, 1)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 4 * math.sqrt(2 * 99)


# ---- weights ----


def test_exp_weight_is_accurate_and_vanishes_below_the_normal_range() -> None:
    u = torch.linspace(0, 87, 300001)
    exact = torch.exp(-u.double())
    assert ((exp_weight(u) - exact).abs() / exact).max() < 1e-7
    assert exp_weight(torch.tensor([0.0, 87.4, INF])).tolist() == [1.0, 0.0, 0.0]
    assert fixed_point(torch.tensor([1.0, 0.5, 2.0**-40, 2.0**-42])).tolist() == [2**40, 2**39, 1, 0]


# ---- backends agree ----


@pytest.mark.skipif(not registry.native_available(), reason="not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("n", "v"), [(300, 1), (300, 2), (3000, 123), (300, 256), (300, 5003), (16, 151936)], ids=lambda x: str(x)
)
@pytest.mark.host
def test_native_draws_the_tokens_of_the_definition(
    n: int, v: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, parameters = mixed_rows(n, v, seed=v)
    logits = logits.to(dtype)
    results = {}
    for name in ("naive", "native"):
        monkeypatch.setenv("RLHF_KERNELS_BACKEND", name)
        results[name] = sample(logits, **parameters)
    assert torch.equal(results["native"][0], results["naive"][0])
    torch.testing.assert_close(results["native"][1], results["naive"][1], rtol=2e-7, atol=2e-7, equal_nan=True)


def test_half_logits_draw_as_their_fp32_values(backend: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        every = bits.view(dtype)
        every = every[every.isfinite()].flip(0)[None]
        half, full = (sample(x, **KEYS, temperature=5.0) for x in (every, every.float()))
        assert half[0] == full[0]
        assert half[1] == full[1]


# ---- distribution ----

ROW = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.3, -INF, 1.9, -4.0])


def reference(row: Tensor, temperature: float = 1.0, keep: list[int] | None = None) -> Tensor:
    p = torch.softmax(row.double() / temperature, -1)
    if keep is not None:
        p = torch.zeros_like(p).index_copy(0, torch.tensor(keep), p[keep])
    return p / p.sum()


@pytest.mark.parametrize(
    ("parameters", "keep"),
    [
        ({}, None),
        ({"temperature": 0.5}, None),
        ({"temperature": 3.0}, None),
        ({"top_k": 3}, [2, 6, 3]),
        ({"top_k": 4}, [2, 6, 3, 0]),  # 0 and 4 are equal: the lower index stays
        ({"top_k": 100}, None),
        ({"top_p": 0.6}, [2, 6]),
        ({"top_p": 0.85}, [2, 6, 3, 0]),
        ({"top_k": 3, "top_p": 0.75}, [2, 6]),  # of the mass that top_k left: without top_k three would stay
        ({"top_p": 0.75}, [2, 6, 3]),
        ({"min_p": 0.2}, [2, 6, 3]),
        ({"min_p": 0.15}, [2, 6, 3, 0, 4]),
        ({"temperature": 2.0, "min_p": 0.4}, [2, 6, 3, 0, 4]),
        ({"top_k": 5, "top_p": 0.95, "min_p": 0.3}, [2, 6, 3]),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) or "plain" if isinstance(x, dict) else "",
)
def test_draws_follow_the_filtered_softmax(backend: str, parameters: dict, keep: list[int] | None) -> None:
    row = ROW.to(torch.get_default_device())
    expected = reference(row, parameters.get("temperature", 1.0), keep)
    tokens = draws(row, **parameters)
    assert abs(chi_square(tokens, expected)) < 4
    if keep is not None:
        assert set(tokens.tolist()) == set(keep)


def test_draws_follow_a_large_vocabulary(backend: str) -> None:
    row = torch.randn(1000)
    assert abs(chi_square(draws(row, n=5000), reference(row))) < 4


def test_top_p_counts_equal_tokens_one_by_one(backend: str) -> None:
    flat = torch.zeros(10)
    assert set(draws(flat, 2000, top_p=0.3).tolist()) == {0, 1, 2}
    assert set(draws(flat, 2000, top_p=0.31).tolist()) == {0, 1, 2, 3}
    assert set(draws(flat, 200, top_p=0.0).tolist()) == {0}
    assert set(draws(flat, 2000, top_p=0.5, top_k=4).tolist()) == {0, 1}


@pytest.mark.parametrize("parameters", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}], ids=str)
def test_the_tightest_filter_is_greedy(backend: str, parameters: dict) -> None:
    logits = torch.randn(50, 301)
    token, _ = sample(logits, **KEYS, **parameters)
    assert torch.equal(token, logits.argmax(-1))


# ---- independence ----


def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    logits, parameters = mixed_rows(200, 777, seed=4)
    token, logprob = sample(logits, **parameters)
    order = torch.randperm(200)
    shuffled = sample(logits[order], **{k: x[order] for k, x in parameters.items()})
    assert torch.equal(shuffled[0], token[order])
    assert torch.equal(shuffled[1].view(torch.int32), logprob[order].view(torch.int32))
    for i in range(0, 200, 17):
        alone = sample(logits[i], **{k: x[i] for k, x in parameters.items()})
        assert alone[0] == token[i]
        assert torch.equal(alone[1].view(torch.int32), logprob[i].view(torch.int32))


@pytest.mark.parametrize("name", ["seed", "stream", "sample_index", "position"])
def test_different_keys_give_independent_draws(backend: str, name: str) -> None:
    n, v = 4000, 8
    logits = torch.zeros(n, v)
    one, two = (
        sample(logits, **{**KEYS, "position": torch.arange(n), name: torch.arange(n) + n * i})[0] for i in (0, 1)
    )
    joint = torch.bincount(one * v + two, minlength=v * v)
    expected = n / v**2
    assert abs(((joint - expected) ** 2 / expected).sum() - v * v + 1) < 4 * math.sqrt(2 * v * v)


@pytest.mark.host
def test_threads_do_not_change_results() -> None:
    logits, parameters = mixed_rows(64, 2000, seed=9)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sample(logits, **parameters)
        torch.set_num_threads(2)
        two = sample(logits, **parameters)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


# ---- greedy and logprob ----


def test_greedy_rows_share_the_batch_with_sampled_rows(backend: str) -> None:
    logits = torch.randn(40, 99)
    greedy = torch.arange(40) % 2 == 0
    token, logprob = sample(logits, **KEYS, temperature=0.7, top_k=5, greedy=greedy)
    sampled, _ = sample(logits, **KEYS, temperature=0.7, top_k=5)
    assert torch.equal(token, torch.where(greedy, logits.argmax(-1), sampled))
    expected = torch.log_softmax(logits.double() / 0.7, -1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), expected, rtol=3e-7, atol=3e-7)


def test_temperature_zero_is_greedy_with_the_logprob_at_temperature_one(backend: str) -> None:
    logits = torch.randn(20, 99)
    zero, one = sample(logits, **KEYS, temperature=0.0), sample(logits, **KEYS, temperature=1.0, greedy=True)
    assert torch.equal(zero[0], logits.argmax(-1))
    assert torch.equal(zero[1], one[1])


def test_greedy_ties_go_to_the_lowest_index(backend: str) -> None:
    for v in (3, 600):
        logits = torch.zeros(4, v)
        logits[1, 1:] = 5.0
        logits[2, v - 2 :] = 5.0
        logits[3] = torch.tensor([-0.0, 0.0]).repeat(v)[:v]
        assert sample(logits, **KEYS, greedy=True)[0].tolist() == [0, 1, v - 2, 0]


def test_zeros_of_both_signs_are_equal(backend: str) -> None:
    row = torch.tensor([0.0, -0.0] * 150 + [-1.0])
    for parameters in ({"top_k": 3}, {"top_p": 0.01 * 301 / 300}, {"top_k": 3, "min_p": 1.0}):
        assert set(draws(row, 500, **parameters).tolist()) <= {0, 1, 2, 3}


@pytest.mark.parametrize("gap", [1e-3, 1.0, 12.0, 40.0, 80.0, 100.0])
def test_logprob_keeps_its_digits_at_both_ends(backend: str, gap: float) -> None:
    logits = torch.zeros(2, 1000)
    logits[:, 17] = gap
    low = logits[:1].clone()
    low[0, 17], low[0, 18:] = gap, -INF  # 17 tokens at 0 below the top one
    token, logprob = sample(torch.cat([logits[:1], low]), **KEYS, greedy=True)
    exact = [-math.log1p(n * math.exp(-gap)) for n in (999, 17)]
    assert token.tolist() == [17, 17]
    assert logprob.tolist() == pytest.approx(exact, rel=3e-7)


def test_logprob_is_that_of_the_unfiltered_distribution(backend: str) -> None:
    logits = torch.randn(200, 501) * 5
    token, logprob = sample(logits, **KEYS, temperature=1.3, top_k=7, top_p=0.8, min_p=0.01)
    expected = torch.log_softmax(logits.double() / 1.3, -1).gather(-1, token[:, None])[:, 0]
    assert ((logprob - expected).abs() / (1 + expected.abs())).max() < 3e-7


# ---- extreme values ----


@pytest.mark.parametrize("parameters", [{}, {"greedy": True}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}], ids=str)
def test_rows_without_a_distribution_give_token_zero_and_nan(backend: str, parameters: dict) -> None:
    logits = torch.randn(5, 300)
    logits[0] = -INF
    logits[1, 299] = float("nan")
    logits[2, 7] = INF
    logits[3] = float("nan")
    token, logprob = sample(logits, **KEYS, **parameters)
    assert token[:4].tolist() == [0, 0, 0, 0]
    assert logprob.isnan().tolist() == [True] * 4 + [False]


def test_extreme_logits_and_temperatures_stay_finite(backend: str) -> None:
    row = torch.tensor([3e38, -3e38, 2.9e38, 0.0])
    for temperature in (1e-30, 1.0, 1e30):
        token, logprob = sample(row, **KEYS, temperature=temperature)
        assert token == 0
        assert logprob == 0
    tokens = draws(torch.tensor([1.0, 2.0, 30.0]), temperature=1e30)
    assert abs(chi_square(tokens, torch.full((3,), 1 / 3))) < 4
    tiny = draws(torch.tensor([1.0, 1.0 + 1e-6, -INF]), 500, temperature=1e-8)
    assert tiny.eq(1).all()


def test_the_only_finite_token_is_certain(backend: str) -> None:
    logits = torch.full((1, 513), -INF)
    logits[0, 512] = -7.0
    token, logprob = sample(logits, **KEYS, top_k=3, top_p=0.4)
    assert (token.item(), logprob.item()) == (512, 0.0)


# ---- shapes, registration, errors ----


def test_shapes_strides_and_empty_inputs(backend: str) -> None:
    logits = torch.randn(3, 4, 50)
    position = torch.arange(4)
    token, logprob = sample(logits, seed=0, stream=torch.arange(3)[:, None], position=position)
    assert token.shape == logprob.shape == (3, 4)
    assert (token.dtype, logprob.dtype) == (torch.int64, torch.float32)
    wide = torch.randn(12, 99)
    wide[:, 20:70] = logits.view(12, 50)
    streams, positions = torch.arange(3).repeat_interleave(4), position.repeat(3)
    for view in (wide[:, 20:70], logits.view(12, 50).t().contiguous().t()):
        assert torch.equal(sample(view, seed=0, stream=streams, position=positions)[0], token.view(-1))
    assert sample(torch.zeros(0, 5), **KEYS)[0].shape == (0,)
    assert sample(logits[0, 0], **KEYS)[0].shape == ()


def test_fp64_logits_are_served_by_the_definition() -> None:
    logits = torch.randn(100, 60, dtype=torch.float64)
    position = torch.arange(100)
    double = sample(logits, seed=0, stream=0, position=position)
    single = sample(logits.float(), seed=0, stream=0, position=position)
    assert torch.equal(double[0], single[0])
    torch.testing.assert_close(double[1], single[1], rtol=1e-6, atol=1e-6)


def test_the_op_is_registered_properly() -> None:
    n = 3
    ints = [torch.arange(n) for _ in range(4)]
    arguments = (
        torch.randn(n, 20),
        torch.ones(n),
        torch.full((n,), 5),
        torch.full((n,), 0.9, dtype=torch.float64),
        torch.full((n,), 0.1, dtype=torch.float64),
        *ints,
        torch.tensor([True, False, False]),
    )
    torch.library.opcheck(_sample, arguments)


def test_it_compiles_into_one_graph_with_dynamic_shapes() -> None:
    compiled = torch.compile(
        lambda x, p: sample(x, seed=1, stream=2, position=p, top_k=5, temperature=0.7),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for n in (4, 9):
        logits, position = torch.randn(n, 33), torch.arange(n)
        expected = sample(logits, seed=1, stream=2, position=position, top_k=5, temperature=0.7)
        torch.testing.assert_close(compiled(logits, position), expected)


def test_logits_that_require_grad_are_not_differentiated() -> None:
    _, logprob = sample(torch.randn(3, 9, requires_grad=True), **KEYS)
    assert not logprob.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be a fp32"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must be"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and >= 0, got -1.0 in row 0"),
        ({"temperature": torch.tensor([1.0, float("nan")])}, ValueError, "temperature .* row 1"),
        ({"temperature": "1"}, TypeError, "temperature must be a number"),
        (
            {"temperature": torch.ones(5)},
            ValueError,
            r"temperature must broadcast to \(2,\), got shape \(5,\)",
        ),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k must have an integer type, got torch.float32"),
        ({"top_k": -1}, ValueError, "top_k must be >= 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        ({"min_p": -0.1}, ValueError, "min_p must be in"),
        ({"position": -1}, ValueError, "position must be in"),
        ({"sample_index": 2**32}, ValueError, "sample_index must be in"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
        ({"greedy": 1}, TypeError, "greedy must be a bool"),
        ({"greedy": torch.ones(2)}, TypeError, "greedy must have bool"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.host
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sample(**{"logits": torch.zeros(2, 3), **KEYS, **change})
