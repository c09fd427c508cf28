"""A copy of the checkout without what was built in it, for tests that build something else."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MADE = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "output", "__pycache__", "runs")


def copy_to(target: Path) -> Path:
    shutil.copytree(ROOT, target, ignore=MADE)
    return target
