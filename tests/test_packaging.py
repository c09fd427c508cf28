"""The wheel as a user gets it: built from the checkout, installed elsewhere, run from an empty directory."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    with FileLock(f"{out}.lock"):  # of several test processes the first builds, the others wait
        if not any(out.glob("*.whl")):
            build_wheel(out)
    return next(out.glob("*.whl"))


def build_wheel(out: Path) -> None:
    """Builds from a copy: what lies in build/ must not end up in the wheel."""
    source = out / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "output"))
    command = [*PIP, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run_outside(installed: Path, code: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_both_packages_both_extensions_and_the_demo_checkpoint(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("rlhf_kernels/_C", "rlhf_kernels/_engine", "rlhf_trainer/cli.py"):
        assert any(n.startswith(part) for n in names), part
    assert any(n.startswith("rlhf_trainer/demo/assets/") and n.endswith(".safetensors") for n in names)
    assert {f"rlhf_trainer/configs/{name}.yaml" for name in ("cpu_2", "ddp", "fsdp2")} <= set(names)
    assert not any(n.startswith(("tests/", "benchmarks/", "csrc/")) for n in names)


def test_the_wheel_is_tagged_for_this_python_and_never_abi3(wheel):
    assert "abi3" not in wheel.name
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name


def test_the_installed_ops_run_compiled_outside_the_checkout(installed, tmp_path):
    code = (
        "import torch, rlhf_kernels, rlhf_kernels._C\n"
        "from rlhf_kernels.ops.registry import native_available\n"
        "h, w = torch.randn(3, 8), torch.randn(50, 8)\n"
        "out = rlhf_kernels.linear_logprob(h, w, torch.tensor([1, 2, 3]))\n"
        "want = (h @ w.T).log_softmax(-1)[range(3), [1, 2, 3]]\n"
        "torch.testing.assert_close(out.logprob, want)\n"
        "print(native_available(), rlhf_kernels.__file__)\n"
    )
    native, where = run_outside(installed, code, tmp_path).split()
    assert native == "True"
    assert where.startswith(str(installed))


def test_the_installed_trainer_trains_the_demo_checkpoint_outside_the_checkout(installed, tmp_path):
    code = (
        "import rlhf_trainer, sys\n"
        "from rlhf_trainer.cli import main\n"
        "assert rlhf_trainer.__file__.startswith(sys.argv[1]), rlhf_trainer.__file__\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(installed)}
    flags = [
        "--total-steps",
        "1",
        "--rollout-batch-size",
        "4",
        "--max-completion-length",
        "8",
        "--no-report",
        "--output",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), "hydra-ppo", *flags, "out"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]  # the held-out prompts before training, and the step
