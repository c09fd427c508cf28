"""How the CUDA kernels get into the compiled ops, or stay out of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import nvcc
from rlhf_kernels.ops import registry

ROOT = Path(__file__).resolve().parents[2]
OPS = ("head_stats", "head_exp", "head_js", "head_grad", "logprob_rows", "logprob_rows_backward", "sample_rows")


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_asking_for_cuda_without_a_cuda_build_of_torch_is_one_clear_line():
    done = setup("--version", RLHF_KERNELS_CUDA="1")
    assert done.returncode != 0
    assert re.fullmatch(r"RLHF_KERNELS_CUDA is 1, but this torch is built without CUDA: .*\n", done.stderr)


def test_the_cuda_part_left_out_is_one_clear_line():
    done = setup("--version", RLHF_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "building the CPU kernels only: RLHF_KERNELS_CUDA is 0" in done.stdout


def test_the_flags_that_are_checked_are_those_of_the_build():
    text = (ROOT / "setup.py").read_text()
    for flag in nvcc.FLAGS:
        if flag == "-Xptxas=-v":  # says what ptxas made, and changes nothing
            continue
        for part in flag.replace("-Werror=", "-Werror ").split():
            part = part.replace("-DTORCH_TARGET_VERSION=", "")
            assert f'"{part}"' in text, flag


def test_every_source_travels_with_the_source_distribution():
    patterns = (ROOT / "MANIFEST.in").read_text().split("recursive-include csrc ")[1].splitlines()[0].split()
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert any(path.suffix == ".cuh" for path in files)
    assert [path for path in files if not any(path.match(pattern) for pattern in patterns)] == []


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("op", [*OPS, "lora_small_m"])
def test_a_cuda_build_of_torch_has_the_cuda_ops(op):
    assert registry.native_devices(op) == (("cpu", "cuda") if op in OPS else ("cuda",))
