"""linear_logprob over the test matrix: every pair of two factors' values meets the error rule of `head_cases`."""

import pytest
from head_cases import BF16, DISTRIBUTION_FIELDS, F16, F32, OPTIONS, as_exact_as_plain, identify, pairwise

pytestmark = pytest.mark.usefixtures("device")

# numbers are exact in fp32: what is lost by rounding the arguments themselves is not the op's
FACTORS = {
    "width": (63, 96, 97, 130, 1),
    "dtype": (BF16, F32, F16),
    "p_y": (None, 1e-9, 0.5, 0.9998, 1),
    "kl": (1e-7, 1e-4, 1e-2, 1.0, 10.0),
    "shift": (0.0, -60.0),
    **OPTIONS,
}
QUICK = {"vocabulary": (123, 5003), "rows": (1, 7, 128), **FACTORS}
WHOLE = {"vocabulary": (123, 5003, 32000, 50257, 128256, 151936), "rows": (1, 7, 128, 1937), **FACTORS}


def possible(row: dict) -> bool:
    """Without what the API forbids, what a case cannot be built for, and what the oracle has no time for."""
    return not (
        (row["rows"] > 128 and row["vocabulary"] > 32000)
        or (row["save"] == "grad_vector" and row["train"])
        or (row["width"] == 1 and (row["p_y"] is not None or row["kl"] > 1))
        or (row["upstream"] != "signed" and len(row["grads"]) == 1)
        or (row["rows"] == 1 and row["ignored"])
        or (row["dtype"] == F16 and "k3" in row["grads"] and (row["kl"] > 0.1 or row["lora"]))  # e^-k1 overflows fp16
    )


@pytest.mark.parametrize("options", pairwise(QUICK, possible), ids=identify)
def test_small_vocabularies(options):
    as_exact_as_plain(**options)


@pytest.mark.parametrize("upstream", ["signed", "all zero"])
@pytest.mark.parametrize("save", FACTORS["save"])
@pytest.mark.parametrize(("rows", "ignored"), [(0, ()), (7, "all"), (128, "all"), (7, ())])
def test_no_row_or_no_gradient_to_work_on(rows, ignored, save, upstream):
    as_exact_as_plain(
        rows=rows, ignored=ignored, save=save, upstream=upstream, vocabulary=123, dtype=BF16, temperature="per row",
        grads=DISTRIBUTION_FIELDS, lora=True, train=save in ("recompute", "logits"), bias=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", pairwise(WHOLE, possible), ids=identify)
def test_the_whole_matrix(options):
    as_exact_as_plain(**options)


def test_every_possible_pair_of_values_is_in_the_matrix():
    rows = pairwise({"a": (1, 2, 3), "b": "xy", "c": (0, 1)}, lambda row: not (row["a"] == 1 and row["b"] == "x"))
    for a in (1, 2, 3):
        for b in "xy":
            assert any(row["a"] == a and row["b"] == b for row in rows) == ((a, b) != (1, "x"))
        assert {row["c"] for row in rows if row["a"] == a} == {0, 1}
    assert {(row["b"], row["c"]) for row in rows} == {("x", 0), ("x", 1), ("y", 0), ("y", 1)}
    assert len(rows) <= 7
