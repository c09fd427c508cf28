"""Peak memory of one contestant above its inputs, in a process of its own.

The libraries are warmed up on a tiny shape first, so that thread pools, code and their own buffers are on nobody's
bill. On the CPU the measure is the growth of the resident set's peak; on a CUDA device, of the allocator's peak.
"""

import ctypes
import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.case import Case, Run, Unavailable
from benchmarks.machine import ROOT


def peak_in_fresh_process(benchmark: str, device: str, case: str, contestant: str, timeout: float = 300) -> int:
    """Bytes above the inputs; RuntimeError with the process's last words where it fails."""
    command = [sys.executable, "-m", "benchmarks", benchmark, "--device", device, "--peak-of", case, contestant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {contestant} in {case!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def peak_of(case: Case, contestant: str, device: str) -> int:
    """In the fresh process: warms up, makes the inputs, runs the contestant once."""
    _prepare(case, contestant, tiny=True)()
    run = _prepare(case, contestant, tiny=False)
    settle(device)  # what the warm-up freed is not to serve the run
    before = peak_bytes(device)
    run()
    return peak_bytes(device) - before


def _prepare(case: Case, contestant: str, tiny: bool) -> Run:
    contestants = case.build(tiny)
    if contestant not in contestants:
        raise Unavailable(f"{contestant!r} is not one of {', '.join(contestants)}")
    return contestants[contestant]()


def settle(device: str = "cpu") -> None:
    """Gives freed memory back and starts the peak anew from what is held now.

    Linux lets a process set its peak back to what is resident; elsewhere the old peak is the floor.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        pass


def held_bytes(device: str = "cpu") -> int:
    """What the process holds now: resident, or of a CUDA device's memory in tensors."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status_bytes("VmRSS")


def peak_bytes(device: str = "cpu") -> int:
    """The most it held since `settle`."""
    if not device.startswith("cuda"):
        return _status_bytes("VmHWM")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
