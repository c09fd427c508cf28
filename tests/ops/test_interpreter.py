"""Runs the files of tests/ops/interpreter in Triton's interpreter, each in a process of its own (see its conftest)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))
NOTHING_COLLECTED = 5

VERSIONS = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
runs = pytest.mark.skipif(
    VERSIONS[0] < (3, 7) and VERSIONS[1] >= (2, 4), reason="the interpreter of Triton 3.6 fails with numpy 2.4"
)


def interpret(file: Path, marks: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", "-m", marks, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parents[3])


def test_there_are_files_to_interpret():
    assert FILES


@runs
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_triton_kernels_in_the_interpreter(file):
    run = interpret(file, "not slow")
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]


@runs
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_the_long_tests_of_triton_kernels_in_the_interpreter(file):
    run = interpret(file, "slow")
    assert run.returncode in (0, NOTHING_COLLECTED), run.stdout[-20000:] + run.stderr[-2000:]
