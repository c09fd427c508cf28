"""README for someone who has only the wheel: a new virtual environment, nothing of the checkout on its path.

Installing needs a package registry and takes minutes; the versions are those of constraints.txt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blocks import ROOT

HERE = Path(__file__).resolve().parent


def run(*command: object, cwd: Path, minutes: float) -> str:
    """Standard output; the end of both streams where the command fails."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60 * minutes)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment in which README's installation has been done, from a copy of the checkout."""
    base = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", base / "venv", cwd=base, minutes=2)
    made = base / "venv/bin/python"
    pip = (made, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
    run(*pip, "torch", "setuptools", "wheel", "ninja", "pybind11", cwd=base, minutes=15)
    copied = base / "source"
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "runs"))
    run(made, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", base, copied, cwd=base, minutes=10)
    shutil.rmtree(copied)
    wheel = next(base.glob("*.whl"))
    run(*pip, f"{wheel}[trainer]", cwd=base, minutes=15)
    return made


@pytest.mark.slow
def test_every_block_of_readme_runs_on_the_installed_wheel(python, tmp_path):
    where = "import rlhf_kernels, rlhf_trainer; print(rlhf_kernels.__file__, rlhf_trainer.__file__)"
    venv = str(python.parent.parent)
    assert all(file.startswith(venv) for file in run(python, "-c", where, cwd=tmp_path, minutes=1).split())
    told = run(python, HERE / "page.py", ROOT / "README.md", "--console", cwd=tmp_path, minutes=10)
    assert told.count("python\n") >= 3
    assert (tmp_path / "runs/hydra/metrics.jsonl").is_file()
