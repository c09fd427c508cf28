"""Random calls of lora_linear and lora_linears against float64: values and every gradient by the error rule.

A case is its number: `as_exact_as_plain(1377)` runs what failed as 1377. The quick suite takes the first 150, `slow`
all 2,000; RLHF_KERNELS_FUZZ=first:last chooses others.
"""

import os

import pytest
from ops.lora_cases import as_exact_as_plain

BLOCK = 50  # cases a test

FIRST, LAST = (int(v) for v in os.environ.get("RLHF_KERNELS_FUZZ", "0:2000").split(":"))
QUICK = 150


def failures(first: int, last: int) -> list[str]:
    """What failed of the cases [first, last), each with its number."""
    failed = []
    for number in range(first, last):
        try:
            as_exact_as_plain(number)
        except Exception as error:  # all of a block's failures are shown at once
            failed.append(f"case {number}: {type(error).__name__}: {error}")
    return failed


@pytest.mark.parametrize("first", range(FIRST, min(LAST, FIRST + QUICK), BLOCK))
def test_random_calls_are_as_exact_as_the_plain_formula(first):
    assert failures(first, min(first + BLOCK, LAST)) == []


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST + QUICK, LAST, BLOCK))
def test_many_more_random_calls_are_too(first):
    assert failures(first, min(first + BLOCK, LAST)) == []


@pytest.mark.parametrize("backend", ["native", "naive"])
def test_so_are_they_on_a_backend_that_is_asked_for(backend, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", backend)
    assert failures(2000, 2030) == []
