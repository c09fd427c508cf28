"""One CPU wheel for torch 2.11 and later, and the wheel with CUDA code: `make wheel`, with a CUDA build of torch 2.11
(tests/cuda_torch.py) in an environment that has neither triton nor transformers.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import checkout
import cuda_torch
import pytest
import torch
from filelock import FileLock

from benchmarks.kernels import nvcc

ROOT = Path(__file__).resolve().parent.parent
CUDA_TORCH = Path(sys.prefix) / ".cuda"  # where `make cuda-torch` puts it
OPS = ("test_linear_logprob.py", "test_logprob.py", "test_lora.py", "test_lora_direct.py", "test_sampling.py")
OPS += ("test_attention.py", "test_advantage.py", "test_head_tiles.py", "test_lora_tiles.py", "test_registry.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc (the CUDA toolkit) is not installed"),
]


@pytest.fixture(scope="module")
def cuda_python() -> Path:
    """A Python whose torch is a CUDA build: this one, or that of `make cuda-torch`, made if need be."""
    if torch.version.cuda is not None:
        return Path(sys.executable)
    with FileLock(f"{CUDA_TORCH}.lock"):
        if not (CUDA_TORCH / ".made").exists():
            try:
                cuda_torch.make(CUDA_TORCH, "2.11.0")
            except subprocess.CalledProcessError:
                pytest.skip("torch 2.11.0 can not be had from the registry")
            (CUDA_TORCH / ".made").touch()
    return CUDA_TORCH / "bin" / "python"


@pytest.fixture(scope="module")
def dist(cuda_python, tmp_path_factory) -> Path:
    """What `make wheel` leaves in dist/ of a clean checkout. Its environment for building is this one."""
    copy = checkout.copy_to(tmp_path_factory.mktemp("checkout") / "source")
    command = ["make", "-o", ".venv/.tools", "wheel", f"BIN={sys.prefix}/bin", f"GPU_PYTHON={cuda_python}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return copy / "dist"


def wheels(dist: Path) -> dict[str, Path]:
    return {"cuda" if "+cu" in path.name else "cpu": path for path in dist.glob("*.whl")}


def unpacked(wheel: Path, target: Path) -> Path:
    zipfile.ZipFile(wheel).extractall(target)
    return target


def in_environment(python: Path, site: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF_KERNELS_", "PYTEST_", "PYTHON"))}
    variables |= {"PYTHONPATH": os.pathsep.join([str(site), str(cwd)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *command], cwd=cwd, env=variables, capture_output=True, text=True)


def test_make_wheel_makes_the_source_distribution_the_cpu_wheel_and_the_cuda_wheel(dist):
    assert sorted(wheels(dist)) == ["cpu", "cuda"]
    assert len(list(dist.iterdir())) == 3


def test_the_cuda_wheel_has_code_for_both_chips_in_every_kernel(dist, tmp_path):
    library = next((unpacked(wheels(dist)["cuda"], tmp_path) / "rlhf_kernels").glob("_C.*"))
    listed = subprocess.run([nvcc.cuobjdump(), "-lelf", str(library)], capture_output=True, text=True, check=True)
    found = re.findall(r"\.(sm_\w+)\.cubin", listed.stdout)
    for chip in nvcc.ARCHES.values():
        assert found.count(chip) == len(nvcc.sources()), listed.stdout
    assert set(found) == set(nvcc.ARCHES.values())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_ops_pass_their_tests_under_the_oldest_torch_without_triton_and_transformers(
    dist, kind, cuda_python, tmp_path
):
    site = unpacked(wheels(dist)[kind], tmp_path / "site")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=checkout.MADE)
    files = [f"tests/ops/{name}" for name in OPS]
    done = in_environment(
        cuda_python, site, tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "-rs", *files
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_cuda_build_of_torch_finds_in_each_wheel_what_it_has(dist, kind, cuda_python, tmp_path):
    site = unpacked(wheels(dist)[kind], tmp_path / "site")
    code = "from rlhf_kernels.ops.registry import native_devices as n; print(*n('sample_rows'), *n('lora_small_m'))"
    done = in_environment(cuda_python, site, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == (["cpu", "cuda", "cuda"] if kind == "cuda" else ["cpu"])
