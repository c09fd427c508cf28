"""A copy of the checkout without what was built in it, for tests that build something else."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "output", "__pycache__", "runs")


def copy_to(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=MADE)
    return target


def run(command: list[str], directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `command` in a copy, whose packages it imports; of this process's own settings it gets none."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RLHF_KERNELS_", "PYTEST_"))}
    environment |= {"PYTHONPATH": str(directory), **variables}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
