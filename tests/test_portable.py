"""The compiled ops of the CPU as aarch64 gets them: without the clones, targets and intrinsics of x86-64."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import checkout
import pybind11
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CROSS = "aarch64-linux-gnu-g++"
SOURCES = [path for folder in ("cpu", "engine") for path in sorted((ROOT / "csrc" / folder).glob("*.cpp"))]
TESTS = ("test_linear_logprob.py", "test_logprob.py", "test_lora.py", "test_sampling.py", "test_attention.py")
TESTS += ("test_advantage.py", "test_lora_direct.py", "test_lora_routing.py")


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_without_the_parts_of_x86_64_no_file_includes_its_headers():
    files = [str(path) for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    torch_headers = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++20", "-DRLHF_KERNELS_PORTABLE", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-M"]
    command += ["-I", str(ROOT / "csrc"), "-isystem", str(torch_headers)]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    headers = {Path(word).name for word in done.stdout.split()}
    assert {"isa.h", "library.h"} <= headers
    assert not {name for name in headers if re.fullmatch(r"\w*intrin\.h|cpuid\.h", name)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} (Debian: g++-aarch64-linux-gnu) is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_file_compiles_for_aarch64(source):
    headers = [Path(torch.__file__).parent / "include", pybind11.get_include(), sysconfig.get_path("include")]
    command = [CROSS, "-fsyntax-only", "-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-I", str(ROOT / "csrc")]
    command += [word for header in headers for word in ("-isystem", str(header))]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package and its tests whose compiled ops have no code of x86-64's own."""
    copy = checkout.copy_to(tmp_path_factory.mktemp("portable") / "source")
    flags = {"CFLAGS": "-DRLHF_KERNELS_PORTABLE", "CXXFLAGS": "-DRLHF_KERNELS_PORTABLE", "RLHF_KERNELS_CUDA": "0"}
    done = checkout.run([sys.executable, "setup.py", "build_ext", "--inplace"], copy, **flags)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return copy


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_the_portable_ops_use_no_wide_registers(package):
    library = next((package / "rlhf_kernels").glob("_C.*so"))
    code = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "%xmm" in code
    assert "%ymm" not in code
    assert "%zmm" not in code


@pytest.mark.slow
@pytest.mark.parametrize("file", TESTS)
def test_the_portable_ops_pass_their_tests(package, file):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", f"tests/ops/{file}"]
    done = checkout.run(command, package)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
