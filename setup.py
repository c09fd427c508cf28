"""Builds the two compiled parts: the ops (PyTorch stable ABI) and the engine core (pybind11, no torch in it).

The CUDA sources are added when nvcc and a CUDA build of torch are at hand. RLHF_KERNELS_CUDA=0 leaves them out;
with RLHF_KERNELS_CUDA=1 it is an error if they cannot be built. A build that has them says so in its version: +cu130.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

try:
    import torch
except ImportError:
    sys.exit("rlhf_kernels needs torch to build: install torch>=2.11 first, then `pip install --no-build-isolation .`")
import pybind11

ROOT = Path(__file__).parent
NVCC = shutil.which("nvcc")
TORCH_TARGET = "0x020b000000000000"  # the oldest torch (2.11) one binary serves


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(pattern))


def cuda_missing() -> str | None:
    """Why the CUDA kernels are not built; None: they are."""
    asked = os.environ.get("RLHF_KERNELS_CUDA")
    if asked not in (None, "", "1"):
        return f"RLHF_KERNELS_CUDA is {asked}"
    missing = "this torch is built without CUDA" if torch.version.cuda is None else None
    if missing is None and NVCC is None and os.environ.get("CUDA_HOME") is None:
        missing = "there is no nvcc"
    if missing is not None and asked == "1":
        sys.exit(f"RLHF_KERNELS_CUDA is 1, but {missing}: the CUDA kernels need nvcc and a CUDA build of torch")
    return missing


def version() -> str:
    """That of the package; with the CUDA kernels also which CUDA, since both wheels may lie in one folder."""
    text = (ROOT / "rlhf_kernels" / "__init__.py").read_text()
    number = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)[1]
    return number if cuda_missing() else f"{number}+cu{torch.version.cuda.replace('.', '')}"


def find_toolkit() -> None:
    """Sets CUDA_HOME to the toolkit that nvcc uses: torch looks beside nvcc, which may be a link or a wrapper."""
    if NVCC is not None and "CUDA_HOME" not in os.environ:
        plan = subprocess.run([NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", plan, flags=re.MULTILINE):
            os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def ops_extension() -> Extension:
    host_flags = [
        "-O3",
        "-g0",  # Python's own flags ask for debug information, 20 MB of it
        "-std=c++20",
        "-fopenmp-simd",
        "-fno-trapping-math",  # lets selects become vector blends
        "-Wall",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    files = ["csrc/schema.cpp", *sources("cpu", "*.cpp")]
    missing = cuda_missing()
    if missing is None:
        nvcc_flags = [
            "-O3",
            "-std=c++20",
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "--expt-relaxed-constexpr",  # std::numeric_limits and std::bit_cast in kernels
            "-Werror",
            "all-warnings",
            "-DUSE_CUDA",  # the stable headers declare what CUDA code needs under it
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ]
        return CUDAExtension(
            "rlhf_kernels._C",
            [*files, *sources("cuda", "*.cu")],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": host_flags, "nvcc": nvcc_flags},
            py_limited_api=True,
        )
    print(f"rlhf_kernels: building the CPU kernels only: {missing}")
    return CppExtension(
        "rlhf_kernels._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": host_flags},
        py_limited_api=True,
    )


def engine_extension() -> Extension:
    return Extension(
        "rlhf_kernels._engine",
        sources("engine", "*.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-Wall", "-fvisibility=hidden"],
        language="c++",
    )


find_toolkit()
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402 (it reads CUDA_HOME)

extensions = [ops_extension()]
if sources("engine", "*.cpp"):
    extensions.append(engine_extension())

setup(
    version=version(),
    packages=[
        *find_packages(".", include=["rlhf_kernels", "rlhf_kernels.*"]),
        *("rlhf_trainer" + p for p in ["", *("." + q for q in find_packages("python/rlhf_trainer"))]),
    ],
    package_data={"rlhf_kernels": ["py.typed"], "rlhf_trainer": ["py.typed", "configs/*", "demo/assets/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    zip_safe=False,
)
