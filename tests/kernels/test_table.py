"""The kernel table: what it reads from compilers, how it is written into a document."""

import pytest
import triton
import triton.language as tl

from benchmarks.kernels import table, triton_aot
from benchmarks.kernels.row import Row
from rlhf_kernels.ops.shipped import ARCHES, Shipped, everything


@triton.jit
def scaled(x_ptr, out_ptr, N: tl.constexpr):
    """Holds the whole of x in the program's registers at once."""
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr + tl.arange(0, N), tl.sum(x) * x + tl.max(x * x))


@triton.jit
def product(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@pytest.mark.parametrize("arch", ARCHES)
def test_registers_that_do_not_suffice_show_as_spilled_bytes(arch):
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    few = triton_aot.row(Shipped("scaled", scaled, signature, {"N": 1024}), arch)
    warps = 1024 // triton_aot.target(arch).warp_size  # as many threads as a block may have: few registers for each
    many = triton_aot.row(Shipped("scaled", scaled, signature, {"N": 2**18}, num_warps=warps), arch)
    assert few.spilled == 0 < few.registers < 64
    assert many.spilled > 0


@pytest.mark.parametrize(
    ("arch", "matrix"), [("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05"), ("gfx942", "mfma")]
)
def test_matrix_instructions_are_seen(arch, matrix):
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32"}
    kernel = Shipped("product", product, signature, {"N": 64}, divisible=tuple(signature), gemm=True)
    made = triton_aot.row(kernel, arch)
    assert made.matrix == matrix
    assert made.shared > 0
    assert made.threads == (256 if arch == "gfx942" else 128)


def test_a_shipped_kernel_names_all_its_arguments():
    with pytest.raises(ValueError, match="'out_ptr'"):
        Shipped("scaled", scaled, {"x_ptr": "*fp32"}, {"N": 16})
    with pytest.raises(ValueError, match="'n'"):
        Shipped("scaled", scaled, {"x_ptr": "*fp32", "out_ptr": "*fp32"}, {"N": 16}, divisible=("n",))
    with pytest.raises(ValueError, match="sm_70"):
        everything("sm_70")


def test_the_table_replaces_what_stands_between_the_marks(tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write([Row("gemm", "sm_90", 256, 168, 196608, 0, "wgmma")], document)
    table.write([Row("rows", "sm_80", 128, 40, 32, 0), Row("rows", "sm_90", 128, 44, 0, 8)], document)
    assert (
        document.read_text()
        == f"""before
{table.BEGIN}
| kernel | sm_80 | sm_90 | sm_100 | gfx942 |
| --- | --- | --- | --- | --- |
| rows | 128 x 40 / 32 / 0 | 128 x 44 / 0 / 8 |  |  |
{table.END}
after
"""
    )
    assert "rows" in table.documented(document)


def test_two_kernels_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two kernels are called rows on sm_80"):
        table.markdown([Row("rows", "sm_80", 128, 40, 32, 0), Row("rows", "sm_80", 256, 40, 32, 0)])


def test_a_document_without_the_marks_is_refused(tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text(f"{table.BEGIN} and no end")
    with pytest.raises(ValueError, match="must have"):
        table.write([], document)
