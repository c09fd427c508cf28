"""What a user gets: a wheel made from the source distribution, installed elsewhere, run from an empty directory."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import checkout
import pytest
from filelock import FileLock

import rlhf_kernels

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
PACKAGES = {"rlhf_kernels": ROOT / "rlhf_kernels", "rlhf_trainer": ROOT / "python" / "rlhf_trainer"}
LIBRARIES = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
LIBRARIES |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
OLDEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30)}  # Ubuntu 22.04's
LAZY = ("transformers", "triton", "peft", "accelerate", "datasets", "trl")  # imported where they are needed
IMPORT_SECONDS = 0.3  # of every public name, beyond torch


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    with FileLock(f"{out}.lock"):  # of several test processes the first builds, the others wait
        if not any(out.glob("*.whl")):
            build(out)
    return out


def build(out: Path) -> None:
    """The source distribution of a clean checkout, and the CPU wheel made of that."""
    source = checkout.copy_to(out / "source")
    pack = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    environment = {**os.environ, "RLHF_KERNELS_CUDA": "0"}
    done = subprocess.run([sys.executable, "-c", pack], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    archive = str(next(out.glob("*.tar.gz")))
    command = [*PIP, "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(out), archive]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(shared) -> Path:
    return next(shared.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "-q", "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def run_outside(installed: Path, code: str, cwd: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def package_files() -> set[str]:
    """The files of both packages as a wheel names them."""
    return {
        f"{name}/{path.relative_to(folder)}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and "output" not in path.relative_to(folder).parts
    }


def test_the_wheel_carries_every_file_of_both_packages_both_extensions_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    built = {name for name in names if name.endswith(".so")}
    assert names - built == package_files()
    assert sorted(name.split(".")[0] for name in built) == ["rlhf_kernels/_C", "rlhf_kernels/_engine"]
    assert any(name.startswith("rlhf_trainer/demo/assets/") and name.endswith(".safetensors") for name in names)


def test_the_source_distribution_carries_the_kernels_and_both_packages(shared):
    with tarfile.open(next(shared.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    packages = {name.replace("rlhf_trainer/", "python/rlhf_trainer/", 1) for name in package_files()}
    assert sources | packages | {"setup.py", "LICENSE", "constraints.txt"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_the_wheel_is_tagged_for_this_python_and_never_abi3(wheel):
    assert "abi3" not in wheel.name
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name


def test_the_metadata_have_the_version_of_the_package_and_no_exact_pins(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = message_from_string(archive.read(name).decode())
    assert fields["Version"] == rlhf_kernels.__version__  # one with CUDA code adds +cu130
    required = fields.get_all("Requires-Dist")
    assert "torch>=2.11" in required
    assert not [line for line in required if "==" in line.split(";")[0]]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
@pytest.mark.parametrize("extension", ["_C", "_engine"])
def test_an_extension_needs_torch_and_a_c_library_of_2022_alone(installed, extension):
    path = next((installed / "rlhf_kernels").glob(f"{extension}.*so"))
    headers = subprocess.run(["objdump", "-p", "-h", str(path)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED\s+(\S+)", headers)) <= LIBRARIES  # no libpython, libtorch_python or CUDA
    for library, oldest in OLDEST.items():
        versions = re.findall(rf"\b{library}_([\d.]+)", headers)
        assert max((tuple(map(int, version.split("."))) for version in versions), default=()) <= oldest
    assert ".debug_info" not in headers


def test_the_installed_ops_run_compiled_outside_the_checkout(installed, tmp_path):
    native, where = run_outside(installed, OPS, tmp_path).split()
    assert native == "True"
    assert where.startswith(str(installed))


def test_the_ops_need_neither_triton_nor_transformers_nor_numpy(installed, tmp_path):
    absent = "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"  # None stands for what is not installed
    native, _ = run_outside(installed, absent + OPS, tmp_path, "numpy", "safetensors", *LAZY).split()
    assert native == "True"


def test_a_model_without_transformers_is_an_error_that_names_it(installed, tmp_path):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from rlhf_kernels.nn import HydraModel\n"
        "try: HydraModel.from_pretrained(sys.argv[1], adapters={})\n"
        "except ImportError as error: print(error.name)\n"
    )
    assert run_outside(installed, code, tmp_path, str(tmp_path)).strip() == "transformers"


def test_the_public_names_are_imported_in_less_than_a_third_of_a_second_beyond_torch(installed, tmp_path):
    runs = [[float(word) for word in run_outside(installed, IMPORT, tmp_path, *LAZY).split()] for _ in range(5)]
    torch_alone, package, names, folders = (statistics.median(times) for times in zip(*runs))
    print(f"torch {torch_alone:.2f} s, rlhf_kernels {package:.3f}, every name {names:.2f}, folders {folders:.2f}")
    assert names < IMPORT_SECONDS, runs


def test_the_installed_trainer_trains_the_demo_checkpoint_outside_the_checkout(installed, tmp_path):
    code = (
        "import rlhf_trainer, sys\n"
        "from rlhf_trainer.cli import main\n"
        "assert rlhf_trainer.__file__.startswith(sys.argv[1]), rlhf_trainer.__file__\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    size = ["--total-steps", "1", "--rollout-batch-size", "4", "--max-completion-length", "8"]
    run_outside(installed, code, tmp_path, str(installed), "hydra-ppo", *size, "--no-report", "--output", "out")
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]  # the held-out prompts before training, and the step


# One call of each kind of op; linear_logprob against its definition
OPS = """
import torch, rlhf_kernels as rk, rlhf_kernels._C
from rlhf_kernels.ops.registry import native_available
h, w = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
out = rk.linear_logprob(h, w, torch.tensor([1, 2, 3]), entropy=True)
torch.testing.assert_close(out.logprob, (h @ w.T).log_softmax(-1)[range(3), [1, 2, 3]])
out.logprob.sum().backward()
rk.logprob(h @ w.T, torch.tensor([1, 2, 3]))
a, b = torch.randn(2, 4, 8), torch.randn(2, 50, 4)
y = rk.lora_linear(h, w, a, b, adapter_index=torch.tensor([0, 1, -1]))
torch.testing.assert_close(y[2], h[2] @ w.T)
token, logprob = rk.sample(y.detach(), temperature=0.8, top_p=0.9, seed=0, stream=0, position=torch.arange(3))
rk.gae(torch.randn(8), torch.randn(8), lengths=torch.tensor([5, 3]))
print(native_available(), rk.__file__)
"""

# Prints the CPU seconds of importing torch, and beyond it the package, all its names, and the folders above the ops
IMPORT = """
import sys
from time import process_time as now
times = [now()]
import torch
times.append(now())
import rlhf_kernels
times.append(now())
for name in rlhf_kernels.__all__: getattr(rlhf_kernels, name)
times.append(now())
import rlhf_kernels.nn, rlhf_kernels.generation, rlhf_kernels.memory
times.append(now())
assert not set(sys.argv[1:]) & set(sys.modules), set(sys.argv[1:]) & set(sys.modules)
print(times[1] - times[0], *(time - times[1] for time in times[2:]))
"""
