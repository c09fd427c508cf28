"""Where a result was measured: processor, instruction sets, threads, versions, commit, and how quiet it was."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "peft", "transformers", "triton", "numpy")
# the yardstick (the library's bf16 GEMM) is several times faster on a processor with the last of these
BF16_ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
CAPS = ("OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "RLHF_KERNELS_CPU_ISA")


def describe(device: str) -> dict[str, object]:
    """The machine as plain values for the result file."""
    info = _cpu_info()
    found: dict[str, object] = {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "isa": [flag for flag in BF16_ISA if flag in info.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in CAPS if name in os.environ},
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """Installed versions of what takes part; a peer that is not installed is left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checked-out commit, with "+" where files that git tracks were changed."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" if head and _git("status", "--porcelain", "--untracked-files=no") else head


class Quietness:
    """Share of the machine's processors that others took while this object was in use (0 on a quiet machine)."""

    def __init__(self) -> None:
        self.begin = _busy_seconds()

    def others(self) -> float | None:
        """Others' busy time over all processors' time since the beginning; None where the system does not tell."""
        end = _busy_seconds()
        if self.begin is None or end is None:
            return None
        busy, total, own = (b - a for a, b in zip(self.begin, end))
        return max(0.0, busy - own) / total if total > 0 else None


def load_warning(limit: float = 0.5) -> str:
    """A sentence where more than `limit` tasks were runnable a processor over the last minute, "" otherwise."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load <= limit:
        return ""
    return f"the load average was {load:.1f} a processor at the start: times are not those of a quiet machine"


def _busy_seconds() -> tuple[float, float, float] | None:
    """(busy, total, own) processor seconds so far; own includes finished children."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [float(x) / os.sysconf("SC_CLK_TCK") for x in first]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks), sum(os.times()[:4])  # fields 3 and 4: idle, waiting for disk


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
