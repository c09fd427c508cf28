"""The CUDA kernels as shared libraries that run them on the CPU (csrc/testing), called with CPU tensors.

`HostPasses` has the ops' own signatures, so it can stand where torch.ops.rlhf_kernels does.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-O2", "-g1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class KernelError(RuntimeError):
    """What the run on the host found wrong with a kernel."""


def compiler_missing() -> bool:
    return shutil.which(COMPILER) is None


@functools.cache
def compile_library(source: str, *flags: str) -> Path:
    """csrc/testing/`source` as a shared library, in a directory that lives as long as this process."""
    target = Path(_directory().name) / f"{Path(source).stem}{len(flags)}.so"
    file = ROOT / "csrc" / "testing" / source
    command = [COMPILER, *FLAGS, *flags, "-I", str(ROOT / "csrc"), str(file), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@functools.cache
def _directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_on_host_")


def run_sanitized(source: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh Python under the sanitizers of addresses and alignment; its `library` is that of `source`,
    built for them."""
    library = compile_library(source, "-O1", "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
    runtime = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    paths = (str(Path(__file__).parent), *sys.path)
    code = f"library = {str(library)!r}\n{code}"
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


class Library:
    """Functions that return null or an error's text; tensors are passed by their address."""

    def __init__(self, path: Path | str) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: object) -> None:
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*(_as_c(a) for a in arguments))
        if message is not None:
            raise KernelError(message.decode())

    @contextmanager
    def backwards(self) -> Iterator[None]:
        """The last thread of a block runs first: a missing barrier then gives other results."""
        self.call("run_backwards", True)
        try:
            yield
        finally:
            self.call("run_backwards", False)


class HostPasses(Library):
    """The row passes of linear_logprob and logprob; the library is that of cuda_rows_on_host.cpp."""

    def head_stats(self, z, zr, target, bias, temperature, softcap, scale, raw, kl, rkl, state) -> None:
        self.call("host_head_stats", z, zr, target, bias, temperature, softcap, scale, raw, kl, rkl, state, *z.shape)

    def head_exp(self, z, target, bias, temperature, softcap, scale, raw, first, shift, mass, factor, target_z) -> None:
        shaping = (bias, temperature, softcap, scale, raw)
        self.call("host_head_exp", z, target, *shaping, first, shift, mass, factor, target_z, *z.shape)

    def head_js(self, z, zr, bias, temperature, softcap, scale, raw, lse, ratio, sums) -> None:
        self.call("host_head_js", z, zr, bias, temperature, softcap, scale, raw, lse, ratio, sums, *z.shape)

    def head_grad(self, z, zr, target, bias, temperature, softcap, scale, raw, coefficients, scratch) -> None:
        self.call("host_head_grad", z, zr, target, bias, temperature, softcap, scale, raw, coefficients, *z.shape)

    def logprob_rows(self, logits, target, temperature, ignore_index, out) -> None:
        source = (TYPES[logits.dtype], logits, logits.stride(0))
        self.call("host_logprob_rows", *source, target, temperature, ignore_index, out, *logits.shape)

    def logprob_rows_backward(self, logits, target, temperature, ignore_index, coefficients, out) -> None:
        source, written = (TYPES[logits.dtype], logits, logits.stride(0)), (out, out.stride(0))
        rest = (target, temperature, ignore_index, coefficients, *written, *logits.shape)
        self.call("host_logprob_rows_backward", *source, *rest)


class HostLora(Library):
    """lora_small_m on a chip with or without clusters; the library is that of cuda_lora_on_host.cpp."""

    def __init__(self, path: Path | str, clusters: bool = True, multiprocessors: int = 132) -> None:
        super().__init__(path)
        self.chip = clusters, multiprocessors
        self.launched = 0

    def lora_small_m(self, x, a, b, index, runs, scaling, scaling_tensor, y, s) -> None:
        n, count = len(scaling), len(y)
        parts = [(p.data_ptr(), q.data_ptr(), p.stride(0), q.stride(0), p.shape[0]) for p, q in zip(a, b)]
        widths = [max((part[4] for part in parts[p * n : p * n + n]), default=0) for p in range(count)]
        outputs = [(t.data_ptr(), t.stride(0), t.shape[1], sum(widths[:p])) for p, t in enumerate(y)]
        of_rows = [e for lo, hi, e in zip(runs[0::3], runs[1::3], runs[2::3]) for _ in range(hi - lo)]
        type_of_a = TYPES[a[0].dtype] if a else TYPES[x.dtype]
        with torch.device("cpu"):
            lists = [torch.tensor(v, dtype=torch.int64) for v in (parts, outputs, of_rows)]
            scales = torch.tensor(scaling)
        self.launched += 1
        self.call(
            "host_lora_small_m", TYPES[x.dtype], type_of_a, x, x.stride(0), *x.shape, lists[0], scales, n, lists[1],
            count, index, index is not None and index.dtype == torch.int64, lists[2] if index is None else None,
            scaling_tensor, s, *((0, 0) if s is None else (s.stride(0), s.shape[0])), *self.chip,
        )  # fmt: skip


class HostSampling(Library):
    """sample on a chip with or without clusters; the library is that of cuda_sample_on_host.cpp."""

    def __init__(self, path: Path | str, clusters: bool = True) -> None:
        super().__init__(path)
        self.clusters = clusters

    def sample_rows(self, logits, *row_parameters) -> tuple[Tensor, Tensor]:
        token = torch.full((len(logits),), -7, device="cpu")
        logprob = torch.full((len(logits),), 7.0, device="cpu")
        source = (TYPES[logits.dtype], logits, logits.stride(0), *logits.shape)
        self.call("host_sample_rows", *source, *row_parameters, token, logprob, self.clusters)
        return token, logprob

    def masses(self, u: Tensor) -> Tensor:
        out = torch.empty(u.shape, dtype=torch.int64)
        self.call("host_masses", u, out, u.numel())
        return out


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
