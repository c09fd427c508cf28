"""Compiles every .cu file of csrc/cuda for the shipped chips, without a GPU, and reads what came of it.

What ptxas says of registers, shared memory and spills it says as it compiles; the machine code is read back with the
`cuobjdump` of Triton's wheel.
"""

import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.kernels.row import Row

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHES = {"sm_80": "sm_80", "sm_90": "sm_90a"}  # a chip's name in the table, and nvcc's
THREADS = 256  # of a block at most: csrc/cuda/common.cuh, kMostThreads
FLAGS = (
    "-O3",
    "-std=c++20",
    *(f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHES.values()),
    "--expt-relaxed-constexpr",
    "-Xptxas=-v",
    "-Werror=all-warnings",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16", "float": "fp32"}


def missing() -> str | None:
    """What is needed and not there; None: all is."""
    if shutil.which("nvcc") is None:
        return "nvcc (the CUDA toolkit) is not installed"
    if not (_torch_headers() / "torch" / "csrc" / "stable" / "library.h").exists():
        return "this torch has no headers of the stable ABI"
    return None


def sources() -> list[Path]:
    """The files that are compiled."""
    return sorted(CUDA.glob("*.cu"))


@cache
def compiled(source: Path) -> tuple[str, str]:
    """(what ptxas said, the machine code for every chip); RuntimeError with nvcc's words where it does not compile."""
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "made.o"
        include = ["-I", str(CUDA.parent), "-isystem", str(_torch_headers())]
        command = ["nvcc", *FLAGS, *include, "-Xcompiler=-fPIC", "-c", str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr}")
        code = subprocess.run([cuobjdump(), "-sass", str(made)], capture_output=True, text=True, check=True)
        return done.stderr, code.stdout


def kernels(source: Path) -> list[Row]:
    """What ptxas made of each kernel of a file on each chip."""
    pattern = (
        r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?"
    )
    rows = []
    for found in re.finditer(pattern, compiled(source)[0], flags=re.DOTALL):
        spilled = int(found["stack"]) + int(found["stores"]) + int(found["loads"])
        name, shared = readable(found["name"]), int(found["shared"] or 0)
        rows.append(Row(name, found["arch"].removesuffix("a"), THREADS, int(found["registers"]), shared, spilled))
    return rows


def instructions(source: Path) -> dict[tuple[str, str], str]:
    """(kernel, chip) -> its machine code."""
    parts = {}
    for block in re.split(r"\n\tcode for (?=sm_)", compiled(source)[1])[1:]:
        arch = block[: block.index("\n")].strip().removesuffix("a")
        for function in block.split("Function : ")[1:]:
            mangled, _, code = function.partition("\n")
            parts[readable(mangled.strip()), arch] = code
    return parts


def rows() -> list[Row]:
    """The table's part: every kernel of every .cu file on every chip; nothing without nvcc."""
    return [] if missing() else [row for source in sources() for row in kernels(source)]


def readable(mangled: str) -> str:
    """A kernel's mangled name as the table calls it: head_stats_kernel<2> is "head_stats<2> (CUDA)"."""
    told = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(?:\w+::)?(\w+?)(?:_kernel)?(<.*?>)?\(", told)
    if found is None:
        raise ValueError(f"{mangled!r} is no kernel's name")
    arguments = re.sub(r"\((?:int|bool)\)", "", found[2] or "")
    for name, short in TYPES.items():
        arguments = arguments.replace(name, short)
    return f"{found[1]}{arguments} (CUDA)"


def _torch_headers() -> Path:
    import torch

    return Path(torch.__file__).parent / "include"


def cuobjdump() -> str:
    """The program that reads CUDA code out of a library: Triton's wheel has one, and the toolkit here does not."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
