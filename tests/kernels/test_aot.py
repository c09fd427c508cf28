"""Every shipped Triton kernel, compiled for every chip without a GPU: no spills, shared memory that fits, and the
matrix instructions where it multiplies matrices. And the table of them in docs/kernels.md."""

import dataclasses

import pytest

from benchmarks.kernels import table, triton_aot
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
    if kernel.few_rows:
        assert made.matrix == ("mfma" if arch == "gfx942" else "mma"), made


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kernel"), KERNELS, ids=[f"{arch}-{kernel.name}" for arch, kernel in KERNELS])
def test_row_kernels_on_smaller_and_on_ragged_blocks_do_not_spill_either(arch, kernel):
    if not isinstance(block := kernel.constexprs.get("BLOCK"), int):
        pytest.skip("not a row kernel")
    values = block // (32 * kernel.num_warps)  # that a thread takes
    for columns in (block, *(size for size in (128, 256, 1024, 2048) if size < block)):
        smaller = dataclasses.replace(
            kernel,
            constexprs={**kernel.constexprs, "BLOCK": columns},
            num_warps=max(4, columns // (32 * values)),
            divisible=tuple(name for name in kernel.divisible if name.endswith("_ptr")),
        )
        made = triton_aot.row(smaller, arch)
        assert made.spilled == 0, (columns, made)


def test_the_documented_table_has_every_shipped_kernel_on_every_chip():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.documented().splitlines()]
    chips = lines[0][1:]
    there = {(line[0], chip) for line in lines[2:] for chip, cell in zip(chips, line[1:]) if cell}
    missing = {(kernel.name, arch) for arch, kernel in KERNELS} - there
    assert not missing, f"run `python -m benchmarks.kernels --write`: {sorted(missing)}"
