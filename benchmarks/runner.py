"""One way of measuring for every benchmark: contestants interleaved in one process, memory in fresh processes.

A benchmark is a function that returns its cases; a case names the work and maps each contestant to a callable. Times
are medians with minimum and maximum over the rounds, in which every contestant runs once before any runs again, so that
what else the machine does falls on all alike. Peak memory is the growth of a fresh process's peak resident set.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Case:
    """One piece of work and the contestants that do it. `setup` is called once; `base` is what ratios refer to."""

    name: str
    contestants: dict[str, Callable[[], object]]
    base: str


@dataclass
class Timing:
    case: str
    contestant: str
    median_s: float
    min_s: float
    max_s: float
    ratio: float  # the base's median over this one's: above 1 is faster than the base
    peak_bytes: int | None = None


@dataclass
class Result:
    benchmark: str
    machine: str
    cpu_threads: int
    versions: dict[str, str]
    commit: str
    timings: list[Timing] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def time_case(case: Case, rounds: int) -> list[Timing]:
    """Times every contestant of `case` `rounds` times, interleaved, after one warm-up each."""
    for run in case.contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in case.contestants}
    for _ in range(rounds):
        for name, run in case.contestants.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    base = statistics.median(seconds[case.base])
    return [
        Timing(case.name, name, statistics.median(s), min(s), max(s), base / statistics.median(s))
        for name, s in seconds.items()
    ]


def peak_in_fresh_process(benchmark: str, case: str, contestant: str) -> int:
    """Bytes by which a fresh process's peak resident set grows while the contestant runs once."""
    command = [sys.executable, "-m", "benchmarks", benchmark, "--peak-of", case, contestant]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_growth(run: Callable[[], object]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def new_result(benchmark: str) -> Result:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return Result(
        benchmark,
        platform.processor() or platform.machine(),
        torch.get_num_threads(),
        {"torch": torch.__version__, "python": platform.python_version()},
        git.stdout.strip(),
    )


def print_table(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.benchmark}: {result.cpu_threads} threads, torch {result.versions['torch']}")
    for column in ("case", "contestant", "median ms", "min", "max", "speed", "peak MiB"):
        table.add_column(column, justify="left" if column in ("case", "contestant") else "right")
    for t in result.timings:
        peak = "" if t.peak_bytes is None else f"{t.peak_bytes / 2**20:.0f}"
        milliseconds = (f"{1e3 * s:.2f}" for s in (t.median_s, t.min_s, t.max_s))
        table.add_row(t.case, t.contestant, *milliseconds, f"{t.ratio:.2f}x", peak)
    Console().print(table)
