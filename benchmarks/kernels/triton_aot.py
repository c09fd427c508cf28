"""Compiles Triton kernels ahead of time, without a GPU, and reads what came of it.

Registers, stack and local memory of a CUDA kernel come from `cuobjdump`, which is in Triton's wheel; those of an AMD
kernel from the metadata in its assembly. The process must not run Triton's interpreter, whose kernels do not compile.
"""

import importlib.resources
import re
import subprocess
import tempfile
from functools import cache
from typing import Any

from benchmarks.kernels.row import Row
from rlhf_kernels.ops.shipped import ARCHES, Shipped, everything

KIB = 1024
SHARED_LIMIT = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
# bytes of shared memory that one program may have
MATRIX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "mfma": r"v_(?:s)?mfma",
}


def target(arch: str) -> Any:
    """Triton's name for `arch`."""
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def compiled(kernel: Shipped, arch: str) -> Any:
    """Triton's compiled kernel, as a launch on `arch` would have made it."""
    import triton
    from triton.compiler import ASTSource

    if not isinstance(kernel.kernel, triton.JITFunction):
        raise RuntimeError(f"{kernel.name} is interpreted: unset TRITON_INTERPRET before kernels are imported")
    names = kernel.kernel.arg_names
    source = ASTSource(
        kernel.kernel,
        {name: kernel.signature.get(name, "constexpr") for name in names},
        dict(kernel.constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.divisible},
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    return triton.compile(source, target=target(arch), options=options)


def row(kernel: Shipped, arch: str) -> Row:
    """What the compiler made of one kernel in one configuration on one chip."""
    made = compiled(kernel, arch)
    registers, spilled = _amd(made.asm["amdgcn"]) if arch.startswith("gfx") else _cuda(made.asm["cubin"])
    code = made.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    matrix = ", ".join(name for name, pattern in MATRIX.items() if re.search(pattern, code))
    return Row(
        kernel.name,
        arch,
        target(arch).warp_size * made.metadata.num_warps,
        registers,
        made.metadata.shared,
        spilled,
        matrix,
    )


def rows() -> list[Row]:
    """The table's part: every shipped Triton kernel on every chip."""
    return [row(kernel, arch) for arch in ARCHES for kernel in everything(arch)]


@cache
def _cuobjdump() -> str:
    return str(importlib.resources.files("triton") / "backends" / "nvidia" / "bin" / "cuobjdump")


def _cuda(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack and local memory a thread)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of the resources: {told.stdout!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd(assembly: str) -> tuple[int, int]:
    """(vector registers a thread, bytes of scratch and of spilled registers a thread)."""

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the AMD metadata have no {name}")
        return int(found.group(1))

    spills = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return field("vgpr_count"), max(field("private_segment_fixed_size"), spills)
