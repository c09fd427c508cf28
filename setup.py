"""Builds the two compiled parts: the ops (PyTorch stable ABI) and the engine core (pybind11, no torch in it).

The CUDA sources are added when nvcc and a CUDA build of torch are at hand, or when RLHF_KERNELS_CUDA=1.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit("rlhf_kernels needs torch to build: install torch>=2.11 first, then `pip install --no-build-isolation .`")
import pybind11

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"  # the oldest torch (2.11) one binary serves


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(pattern))


def cuda_wanted() -> bool:
    asked = os.environ.get("RLHF_KERNELS_CUDA")
    if asked is not None:
        return asked == "1"
    return torch.version.cuda is not None and shutil.which("nvcc") is not None


def ops_extension() -> Extension:
    host_flags = [
        "-O3",
        "-std=c++20",
        "-fopenmp-simd",
        "-fno-trapping-math",  # lets selects become vector blends
        "-Wall",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    files = ["csrc/schema.cpp", *sources("cpu", "*.cpp")]
    cuda_files = sources("cuda", "*.cu")
    if cuda_files and cuda_wanted():
        nvcc_flags = [
            "-O3",
            "-std=c++20",
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        ]
        return CUDAExtension(
            "rlhf_kernels._C",
            files + cuda_files,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": [*host_flags, "-DRLHF_KERNELS_CUDA"], "nvcc": nvcc_flags},
            py_limited_api=True,
        )
    print("rlhf_kernels: building the CPU kernels only (no CUDA sources, nvcc or CUDA build of torch at hand)")
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
        extra_compile_args=["-O3", "-std=c++20", "-Wall", "-fvisibility=hidden"],
        language="c++",
    )


extensions = [ops_extension()]
if sources("engine", "*.cpp"):
    extensions.append(engine_extension())

setup(
    packages=[
        *find_packages(".", include=["rlhf_kernels", "rlhf_kernels.*"]),
        *("rlhf_trainer" + p for p in ["", *("." + q for q in find_packages("python/rlhf_trainer"))]),
    ],
    package_data={"rlhf_trainer": ["demo/assets/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    zip_safe=False,
)
