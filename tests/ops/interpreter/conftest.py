"""Tests of Triton kernels' numbers. They run where the kernels do: on a GPU, or on the CPU in Triton's interpreter.

Under the interpreter (TRITON_INTERPRET=1) every kernel of the process is interpreted, so without a GPU these files are
collected only by the processes that tests/ops/test_interpreter.py starts. bf16 is not for them: the interpreter rounds
it towards zero and multiplies its matrices wrongly.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases of the ops' own tests
pytest.register_assert_rewrite("head_cases")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
collect_ignore_glob = [] if DEVICE == "cuda" or INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch) -> None:
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
