"""Every .cu file compiles for every shipped chip without a warning; no kernel spills, all move 16 bytes at a time."""

import re

import pytest
import torch

from benchmarks.kernels import nvcc, table
from rlhf_kernels.ops.sampling import naive

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=nvcc.missing() or "")
SOURCES = pytest.mark.parametrize("source", nvcc.sources(), ids=lambda path: path.name)
REGISTERS = 65536 // (2 * nvcc.THREADS)  # so that two blocks of the largest size share a multiprocessor


@SOURCES
def test_a_file_compiles_for_every_chip_without_spills(source):
    kernels = nvcc.kernels(source)
    assert len(kernels) >= 2 * len(nvcc.ARCHES)
    assert {row.arch for row in kernels} == set(nvcc.ARCHES)
    for row in kernels:
        assert row.spilled == 0, row
        assert row.registers <= REGISTERS, row
        assert row.shared <= 48 << 10, row  # what a block may have without asking for more


@SOURCES
def test_every_kernel_moves_16_bytes_at_a_time_and_keeps_several_loads_in_flight(source):
    codes = nvcc.instructions(source)
    assert len(codes) == len(nvcc.kernels(source))
    for (name, arch), code in codes.items():
        wide = re.findall(r"\bLDG\.E\.128|\bLDG\.E\.[A-Z.]*128", code)
        assert len(wide) >= 4, (name, arch)
        assert not re.search(r"\b(?:LDL|STL)\b", code), (name, arch)
        if not name.startswith(("head_js", "logprob_rows<", "sample_rows<")):  # those write a few numbers a row
            assert re.search(r"\bSTG\.E\.[A-Z.]*128", code), (name, arch)
        atomics = set(re.findall(r"\b(?:RED|ATOM|ATOMG|ATOMS)\b", code))  # sums come in a fixed order,
        allowed = {"ATOMS"} if name.startswith("sample_rows<") else set()  # or are of integers, in shared memory
        assert atomics <= allowed, (name, arch)


def test_the_weights_of_sampling_are_made_of_single_operations():
    """Every product and sum of the exponential rounds as in the definition: its series is not fused."""
    added = torch.tensor(naive.EXP_COEFFICIENTS[1:-1], dtype=torch.float32).tolist()  # the last is 0.5: common
    for (name, arch), code in nvcc.instructions(nvcc.CUDA / "sampling.cu").items():
        for coefficient in added:
            digits = re.escape(f"{coefficient:.15f}"[:12])
            assert re.search(rf"\bFADD\b[^;\n]* {digits}", code), (name, arch, coefficient)
            assert not re.search(rf"\bFFMA\b[^;\n]* {digits}", code), (name, arch, coefficient)


def test_the_kernel_table_has_the_cuda_kernels():
    assert nvcc.rows in table.SOURCES
    names = {row.kernel for row in nvcc.rows()}
    assert {"head_stats<1> (CUDA)", "head_exp (CUDA)", "logprob_rows<bf16> (CUDA)"} <= names


def test_what_does_not_compile_is_an_error_with_the_words_of_nvcc(tmp_path):
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("__global__ void k(float* x) { int unused = 0; x[0] = 1; }")
    with pytest.raises(RuntimeError, match=r"wrong\.cu does not compile:(?s:.*)unused"):
        nvcc.compiled(wrong)
