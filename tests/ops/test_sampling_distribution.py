"""200,000 draws of a row follow the filtered softmax, for every filter and combination; and the rows that have none."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.sampling import sample

INF = float("inf")
DRAWS = 200_000
KEYS = {"seed": 1, "stream": 2, "position": 3}
BACKENDS = [
    pytest.param("naive", marks=pytest.mark.slow),
    pytest.param("native", marks=pytest.mark.skipif(not registry.native_available(), reason="not built")),
]
# two ties (3.0 and 1.5), a token that cannot be drawn, one that hardly ever is
ROW = torch.tensor([1.5, -0.5, 3.0, 2.2, 1.5, -INF, 3.0, -9.0, 0.4, 2.6])
# by hand: the order is 2 6 9 3 0 4 8 1 7, and at temperature 1 the masses in it are
# .278 .278 .186 .125 .062 .062 .021 .008 .000
FILTERS = {
    "none": ({}, "269304817"),
    "temperature 0.5": ({"temperature": 0.5}, "269304817"),
    "temperature 4": ({"temperature": 4.0}, "269304817"),
    "top_k 1": ({"top_k": 1}, "2"),
    "top_k through a tie": ({"top_k": 5}, "26930"),
    "top_k of all but the least": ({"top_k": 8}, "26930481"),
    "top_k of the vocabulary": ({"top_k": 10}, "269304817"),
    "top_k larger than the vocabulary": ({"top_k": 2**40}, "269304817"),
    "top_p 0": ({"top_p": 0.0}, "2"),
    "top_p in the first tie": ({"top_p": 0.2}, "2"),
    "top_p 0.7": ({"top_p": 0.7}, "269"),
    "top_p 0.9 through a tie": ({"top_p": 0.9}, "26930"),
    "top_p 1": ({"top_p": 1.0}, "269304817"),
    "min_p 0.5": ({"min_p": 0.5}, "269"),
    "min_p 0.2 keeps a tie whole": ({"min_p": 0.2}, "269304"),
    "min_p 1": ({"min_p": 1.0}, "26"),
    "top_k then top_p": ({"top_k": 4, "top_p": 0.8}, "269"),
    "top_k then min_p": ({"top_k": 5, "min_p": 0.1}, "26930"),
    "top_p then min_p": ({"top_p": 0.99, "min_p": 0.06}, "2693048"),
    "all three": ({"top_k": 6, "top_p": 0.95, "min_p": 0.3}, "2693"),
    "all three, hot": ({"temperature": 3.0, "top_k": 7, "top_p": 0.9, "min_p": 0.5}, "269304"),
    "all three, cold": ({"temperature": 0.3, "top_k": 7, "top_p": 0.9, "min_p": 0.01}, "269"),
}
QUICK = {"top_p 0.9 through a tie", "all three"}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", request.param)
    return request.param


def counts(row: Tensor, draws: int = DRAWS, **parameters) -> Tensor:
    """How often each token is drawn. The keys vary as a trainer's do: prompts, samples and positions."""
    i = torch.arange(draws)
    keys = {"seed": 3, "stream": i // 1000, "sample_index": i // 100 % 10, "position": i % 100}
    tokens, _ = sample(row.expand(draws, -1), **keys, **parameters)
    return torch.bincount(tokens, minlength=row.numel())


def surprise(found: Tensor, p: Tensor) -> float:
    """Standardised chi-square of counts against probabilities; cells too small for it are one cell."""
    expected = p * found.sum()
    assert found[expected == 0].sum() == 0, "a token of probability 0 was drawn"
    large = expected >= 10
    found = torch.cat([found[large].double(), found[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]])
    if expected[-1] < 1e-9:
        found, expected = found[:-1], expected[:-1]
    freedom = max(1, expected.numel() - 1)
    return float((((found - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [pytest.param(*case, marks=[] if id in QUICK else [pytest.mark.slow], id=id) for id, case in FILTERS.items()],
)
def test_200000_draws_follow_the_filtered_softmax(backend, parameters, kept):
    kept = [int(token) for token in kept]
    p = torch.zeros(10, dtype=torch.float64)
    p[kept] = (ROW.double() / parameters.get("temperature", 1.0)).exp()[kept]
    found = counts(ROW, **parameters)
    assert found.sum() == DRAWS
    assert surprise(found, p / p.sum()) < 5
    common = [token for token in kept if p[token] / p.sum() * DRAWS > 20]
    assert all(found[token] > 0 for token in common)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{}, {"top_k": 400}, {"top_p": 0.9}], ids=str)
def test_200000_draws_of_a_large_vocabulary_follow_it(backend, parameters):
    row = torch.randn(1021, generator=torch.Generator().manual_seed(2)) * 2
    p, order = row.double().softmax(-1), row.sort(descending=True).indices
    kept = order[: parameters.get("top_k", 1021)]
    if "top_p" in parameters:
        kept = order[: int((p[order].cumsum(0) < parameters["top_p"]).sum()) + 1]
    filtered = torch.zeros_like(p).index_copy(0, kept, p[kept])
    assert abs(surprise(counts(row, **parameters), filtered / filtered.sum())) < 5


def test_a_tiny_temperature_is_certain_and_a_huge_one_is_uniform(backend):
    cold = counts(ROW, 20_000, temperature=1e-30)
    assert cold[2] + cold[6] == 20_000  # the tie at the top stays one
    assert surprise(cold, torch.zeros(10).double().index_fill(0, torch.tensor([2, 6]), 0.5)) < 5
    hot = counts(ROW, 20_000, temperature=1e30)
    uniform = torch.full((10,), 1 / 9, dtype=torch.float64).index_fill(0, torch.tensor(5), 0.0)
    assert abs(surprise(hot, uniform)) < 5


def test_tokens_that_cannot_be_drawn_never_are(backend):
    row = torch.full((33,), -INF)
    row[torch.tensor([7, 15, 32])] = torch.tensor([0.0, 1.0, 0.0])
    for parameters in ({}, {"top_k": 100}, {"top_p": 0.999999}, {"temperature": 1e30}, {"top_k": 32, "min_p": 1e-30}):
        found = counts(row, 5000, **parameters)
        assert set(found.nonzero()[:, 0].tolist()) == {7, 15, 32}


@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 1000, 4099])
def test_greedy_ties_go_to_the_lowest_index_wherever_they_lie(backend, v):
    places = torch.arange(v)
    rows = torch.where(places[None] >= places[:, None], 2.0, 1.0)[:: max(1, v // 40)]  # row i: equal from i on
    token, _ = sample(rows, **KEYS, greedy=True)
    assert torch.equal(token, places[:: max(1, v // 40)])
    cold, _ = sample(rows, **KEYS, temperature=0.0)
    assert torch.equal(cold, token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "parameters", [{}, {"greedy": True}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}], ids=str
)
def test_a_row_without_a_distribution_is_nan_and_its_neighbours_are_not(backend, dtype, parameters):
    good = torch.randn(4, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = sample(good, **KEYS, **parameters)
    for bad in (torch.full((77,), -INF), torch.full((77,), float("nan")), torch.full((77,), INF)):
        rows = good.clone()
        rows[1] = bad
        for place in (0, 40, 76):
            rows[3] = good[3]
            rows[3, place] = INF if bad[0] == -INF else bad[0]
            token, logprob = sample(rows, **KEYS, **parameters)
            assert token[[1, 3]].tolist() == [0, 0]
            assert logprob.isnan().tolist() == [False, True, False, True]
            assert torch.equal(token[::2], want[0][::2])
            assert torch.equal(logprob[::2], want[1][::2])


def test_logprobs_of_a_row_with_impossible_tokens_are_those_of_the_possible_ones(backend):
    row = torch.tensor([0.3, -INF, 1.2, -INF, -0.7])
    token, logprob = sample(row.expand(64, -1), seed=0, stream=0, position=torch.arange(64), temperature=0.8)
    want = (row[[0, 2, 4]].double() / 0.8).log_softmax(-1)[torch.div(token, 2, rounding_mode="floor")]
    torch.testing.assert_close(logprob.double(), want, rtol=3e-7, atol=3e-7)
