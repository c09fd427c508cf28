"""One thread for the tests: two processes that spin on two cores each slow one another a hundredfold. And one seed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draws without a seed of their own are the same in every run: what fails here fails again."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what kernels promise beyond the definition: such a test runs on them even where the suite asks for naive."""
    monkeypatch.delenv("RLHF_KERNELS_BACKEND", raising=False)
