"""Tests of Triton kernels' numbers. They run where the kernels do: on a GPU, or on the CPU in Triton's interpreter.

Under the interpreter (TRITON_INTERPRET=1) every kernel of the process is interpreted, so without a GPU these files are
collected only by the processes that tests/ops/test_interpreter.py starts.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
collect_ignore_glob = [] if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _through_triton(monkeypatch) -> None:
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
