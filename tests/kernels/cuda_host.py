"""The CUDA row kernels as a shared library that runs them on the CPU (csrc/testing), called with CPU tensors.

`HostPasses` has the ops' own signatures, so it can stand where torch.ops.rlhf_kernels does.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-O2", "-g1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class KernelError(RuntimeError):
    """What the run on the host found wrong with a kernel."""


def compile_library(source: str, *flags: str) -> Path:
    """csrc/testing/`source` compiled to a shared library in a directory that lives as long as this process."""
    target = Path(_directory().name) / (Path(source).stem + "".join(flags).replace("/", "_") + ".so")
    if not target.exists():
        options = [*FLAGS, *flags, "-I", str(ROOT / "csrc")]
        command = [COMPILER, *options, str(ROOT / "csrc" / "testing" / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return target


@functools.cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_on_host_")


def compiler_missing() -> bool:
    return shutil.which(COMPILER) is None


class HostPasses:
    """The row passes of linear_logprob and logprob; `library` is the path of a compiled cuda_rows_on_host.cpp."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments: object) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*(_as_c(a) for a in arguments))
        if message is not None:
            raise KernelError(message.decode())

    def head_stats(self, z, zr, target, bias, temperature, softcap, scale, raw, kl, rkl, state) -> None:
        self.call("host_head_stats", z, zr, target, bias, temperature, softcap, scale, raw, kl, rkl, state, *z.shape)

    def head_exp(self, z, target, bias, temperature, softcap, scale, raw, first, shift, mass, factor, target_z) -> None:
        self.call("host_head_exp", z, target, bias, temperature, softcap, scale, raw, first, shift, mass, factor,
                  target_z, *z.shape)  # fmt: skip

    def head_js(self, z, zr, bias, temperature, softcap, scale, raw, lse, ratio, sums) -> None:
        self.call("host_head_js", z, zr, bias, temperature, softcap, scale, raw, lse, ratio, sums, *z.shape)

    def head_grad(self, z, zr, target, bias, temperature, softcap, scale, raw, coefficients, scratch) -> None:
        self.call("host_head_grad", z, zr, target, bias, temperature, softcap, scale, raw, coefficients, *z.shape)

    def logprob_rows(self, logits, target, temperature, ignore_index, out) -> None:
        self.call("host_logprob_rows", TYPES[logits.dtype], logits, logits.stride(0), target, temperature, ignore_index,
                  out, *logits.shape)  # fmt: skip

    def logprob_rows_backward(self, logits, target, temperature, ignore_index, coefficients, out) -> None:
        self.call("host_logprob_rows_backward", TYPES[logits.dtype], logits, logits.stride(0), target, temperature,
                  ignore_index, coefficients, out, out.stride(0), *logits.shape)  # fmt: skip


def _as_c(value: object) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value)
