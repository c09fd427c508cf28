"""The engine's C++ core by itself (csrc/testing/engine_units.cpp), plain and under the address and UB sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ("block_pool", "prefix_tree", "scheduler", "step")
SOURCES = ["csrc/testing/engine_units.cpp", *(f"csrc/engine/{name}.cpp" for name in CORE)]
SANITIZED = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize(
    "flags",
    [["-Wall", "-Wextra", "-Werror"], pytest.param(SANITIZED, marks=pytest.mark.slow)],
    ids=["plain", "sanitized"],
)
def test_pool_tree_scheduler_and_packed_step(flags, tmp_path):
    program = tmp_path / "units"
    command = ["g++", "-std=c++20", "-O1", "-Icsrc", *flags, *SOURCES, "-o", str(program)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if flags is SANITIZED and "cannot find" in built.stderr:
        pytest.skip("the sanitizers' libraries are not installed")
    assert built.returncode == 0, built.stderr
    found = subprocess.run([program], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "whole\n", "")
