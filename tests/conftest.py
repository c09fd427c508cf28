"""One thread for the tests: two processes that spin on two cores each slow one another a hundredfold. One seed. And
`--device cuda`, which takes the tests of the ops to that device.
"""

import os
from collections.abc import Iterator

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests with the device fixture run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: stays on the CPU under --device")
    if config.getoption("--device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.exit("--device cuda: no CUDA device", returncode=2)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device asked for; tensors that a test makes without naming one are on it. Marked `host`: the CPU."""
    import torch

    name = "cpu" if request.node.get_closest_marker("host") else request.config.getoption("--device")
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)
