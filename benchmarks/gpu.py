"""Everything a CUDA machine can tell, in one command and under ten minutes: `make gpu`.

Builds the extensions in place with the Python that runs this, runs the tests of the ops on the device, the sanitizers
on small shapes, and every benchmark. It installs nothing and needs no network. Each stage has its own time limit, log
and exit status; one that fails does not stop the next. Results and logs go to $OUT, by default
benchmarks/results/<device>.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHOLE_S = 590.0
BENCHMARK_S = 75.0
# of the one that would take a quarter of an hour: the case with targets, ours and generate at its largest batch
LONG_S = {"generation": 240.0}
PARTS = {"generation": ("--only", "at most", "--rounds", "1", "--who", "rlhf_kernels", "generate, batch 256")}
NO_DEVICE = 2


@dataclass(frozen=True)
class Stage:
    """A command with its limit in seconds; `missing` says why it cannot run here, which counts as a failure."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: status is ok, failed, timed out or missing."""

    name: str
    status: str
    returncode: int | None
    seconds: float
    limit_s: float
    log: str


def stages(out: Path, benchmarks: Sequence[str]) -> list[Stage]:
    """What is run, in this order. `out` takes the benchmarks' result files."""
    python = sys.executable
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    tests = (python, "-m", "pytest", "--device", "cuda", "-m", "not slow", *workers, "--durations=10", "tests/ops")
    sanitizer = _tool("compute-sanitizer")
    fresh = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation, so that its borders are guarded

    def sanitized(name: str, tool: str, limit: float, ops: str, *options: str) -> Stage:
        command = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options)
        script = (python, "-m", "benchmarks.small_shapes", "--device", "cuda", "--ops", ops)
        missing = None if sanitizer else "compute-sanitizer is not on PATH nor in the CUDA toolkit"
        return Stage(name, (*command, *script), limit, fresh, missing)

    return [
        Stage("build", (python, "setup.py", "build_ext", "--inplace"), 120, {"MAX_JOBS": str(os.cpu_count() or 1)}),
        Stage("tests", tests, 150, missing=None if importlib.util.find_spec("pytest") else "pytest is not installed"),
        sanitized("memcheck", "memcheck", 50, "all"),
        sanitized("racecheck", "racecheck", 50, "all"),
        # of our kernels alone: library GEMMs may read workspace that they do not use
        sanitized("initcheck head", "initcheck", 20, "head", "--kernel-regex", "kns=head_"),
        sanitized("initcheck logprob", "initcheck", 20, "logprob", "--kernel-regex", "kns=logprob_rows"),
        sanitized("initcheck lora", "initcheck", 20, "lora", "--kernel-regex", "kns=lora_|shrink|expand|outer"),
        sanitized("initcheck others", "initcheck", 20, "others", "--kernel-regex", "kns=sample_|gae|whiten|moments"),
        sanitized("initcheck attention", "initcheck", 20, "attention", "--kernel-regex", "kns=attention_|arena_append"),
        *(_benchmark(name, out) for name in benchmarks),
    ]


def _benchmark(name: str, out: Path) -> Stage:
    command = (sys.executable, "-m", "benchmarks", name, "--device", "cuda", "--json", str(out / f"{name}.json"))
    return Stage(f"benchmark {name}", command + PARTS.get(name, ()), LONG_S.get(name, BENCHMARK_S))


def _tool(name: str) -> str | None:
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which(name, path=path)


def run_stage(stage: Stage, log: Path, limit_s: float) -> Outcome:
    """Runs a stage in a process group of its own, which is ended with it, and keeps what it printed in `log`."""
    if stage.missing is not None:
        log.write_text(stage.missing + "\n")
        return Outcome(stage.name, "missing", None, 0.0, limit_s, log.name)
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **stage.environment}
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    status = "timed out" if code is None else "failed" if code else "ok"
    return Outcome(stage.name, status, code, time.monotonic() - begin, limit_s, log.name)


def _end_group(process: subprocess.Popen) -> None:
    """Ends what the stage may have left running; its session holds nothing else."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(todo: Sequence[Stage], out: Path, whole_s: float = WHOLE_S) -> list[Outcome]:
    """Runs the stages one after the other, none beyond what is left of `whole_s` seconds."""
    end, outcomes = time.monotonic() + whole_s, []
    for stage in todo:
        log = out / (stage.name.replace(" ", "-") + ".log")
        print(f"== {stage.name} (at most {stage.limit_s:.0f} s)", flush=True)
        outcome = run_stage(stage, log, min(stage.limit_s, end - time.monotonic()))
        outcomes.append(outcome)
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-60 if outcome.status == "failed" else -12 :]), flush=True)
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f"{o.name:<20} {o.status:<10} {'-' if o.returncode is None else o.returncode:>4} {o.seconds:7.1f} s"
        for o in outcomes
    ]
    return "\n".join([f"{'stage':<20} {'status':<10} {'exit':>4} {'time':>9}", *rows])


def device_name() -> str | None:
    """The CUDA device's name as a folder's, None without one."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def main() -> int:
    name = device_name()
    if name is None:
        print(f"make gpu: no CUDA device for {sys.executable} (GPU_PYTHON chooses another Python)", file=sys.stderr)
        return NO_DEVICE
    from benchmarks.registry import BENCHMARKS

    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in BENCHMARKS if name not in ("rl", "trl")]  # whole trainers: on the CPU
    outcomes = run_all(stages(out, names), out)
    (out / "stages.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1) + "\n")
    print(f"\n{summary(outcomes)}\nlogs and results: {out}")
    return 0 if all(o.status == "ok" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
