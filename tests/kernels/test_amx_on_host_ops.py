"""The compiled ops of the CPU with AMX in software: every begin, end and operand of the AMX unit, on any x86-64 that
has AVX512-BF16 for the rest. The ops' own tests run on a copy of the package that is built so."""

import ctypes
import platform
import sys
from pathlib import Path

import checkout
import cuda_host
import pytest

ROOT = cuda_host.ROOT
TESTS = ("test_head_tiles.py", "test_head_tiles_limits.py", "test_lora_tile_ops.py")
AMX = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is x86-64's"),
    pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package and its tests whose compiled ops, those of the CPU alone, have AMX in software."""
    units = ctypes.CDLL(str(cuda_host.compile_library("amx_units.cpp")))
    units.chosen_unit.restype = ctypes.c_int64
    if units.chosen_unit() == 0:
        pytest.skip("this machine has no AVX512-BF16")
    copy = checkout.copy_to(tmp_path_factory.mktemp("amx") / "source")
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = checkout.run(build, copy, CFLAGS="-DRLHF_AMX_ON_HOST", CXXFLAGS="-DRLHF_AMX_ON_HOST", RLHF_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return copy


def test_the_copy_is_what_is_imported_and_has_the_amx_unit(package):
    script = "import torch, rlhf_kernels._C as c; print(c.__file__, torch.ops.rlhf_kernels.bf16_isa())"
    found, isa = checkout.run([sys.executable, "-c", script], package).stdout.split()
    assert Path(found).is_relative_to(package)
    assert int(isa) == AMX


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("file", TESTS)
def test_the_ops_are_right_on_the_amx_unit(package, file, threads):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"tests/ops/{file}", "-k", "not both_units"]
    done = checkout.run(command, package, OMP_NUM_THREADS=str(threads))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout, done.stdout[-3000:]
