"""Every shipped Triton kernel, compiled for every chip without a GPU: no spills, shared memory that fits, and the
matrix instructions where it multiplies matrices. And the table of them in docs/kernels.md."""

import pytest

from benchmarks.kernels import triton_aot
from rlhf_kernels.ops import shipped

KERNELS = [(arch, kernel) for arch in shipped.ARCHES for kernel in shipped.everything(arch)]


@pytest.mark.parametrize(("arch", "kernel"), KERNELS, ids=[f"{arch}-{kernel.name}" for arch, kernel in KERNELS])
def test_a_shipped_kernel_compiles_without_spills_within_the_chip(arch, kernel):
    made = triton_aot.row(kernel, arch)
    assert made.spilled == 0, made
    assert made.shared <= triton_aot.SHARED_LIMIT[arch], made
    assert made.registers <= (512 if arch.startswith("gfx") else 255), made
    if kernel.gemm:
        assert made.matrix == {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}[arch], made
