"""Kills training runs with signal 9 at random moments, resumes each, and compares it with a run that nobody disturbed.

Each run is the command line's own `main` in a process of its own, forked from this one once the libraries are loaded,
on a tiny random model. Half of the kills come at any moment of the training; the others wait until the files of a
checkpoint (or of the result) are being written or deleted. After the kills come a few SIGINT and SIGTERM. What must be
the same to the bit: the last checkpoint's weights, optimiser state and generators, the result for other programs,
samples.jsonl, and metrics.jsonl without times and bytes.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.machine import ROOT, commit, describe, versions
from benchmarks.memory_plan_run import make_data, make_model
from benchmarks.tables import grid, write_between
from rlhf_trainer import cli

STEPS = 4
TIMED = ("timing/", "memory/", "sampling/tokens_per_second")
COMMON = {
    "total_steps": STEPS, "save_steps": 1, "eval_steps": 2, "rollout_batch_size": 6, "max_prompt_length": 8,
    "per_device_train_batch_size": 4, "max_completion_length": 8, "kv_memory": "1MiB", "report": False,
    "reward": ["benchmarks.memory_plan_run:reward"],
}  # fmt: skip
# adapters with an adaptive KL coefficient; whole models with running statistics; a snapshot in mid-round; no rollouts
RUNS: dict[str, dict[str, Any]] = {
    "hydra-ppo": {"kl_controller": "adaptive", "lr_scheduler_type": "cosine", "lora_r": 4},
    "ppo-max": {"num_mini_batches": 2},
    "inpo": {"rounds": 2},
    "sft": {"lr_scheduler_type": "linear", "warmup_steps": 2},
}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
WAIT_S = 300.0  # for a process to come to what is waited for, on a busy machine


@dataclass
class Blow:
    """One signal, what it was aimed at, and what came of it."""

    algorithm: str
    number: signal.Signals
    aim: str
    logged: int = 0  # lines of metrics.jsonl when it struck
    left: list[str] = field(default_factory=list)  # what it left half-done
    code: int = 0
    resumed_from: int | None = None
    differences: list[str] = field(default_factory=list)


def run(kills: int, seed: int, write: bool) -> bool:
    """Strikes `kills` times with signal 9 and once with each other signal a run; whether every resumed run is exact."""
    draw = random.Random(seed)
    torch.set_num_threads(1)  # a pool's threads would not be there in a fork
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        torch.manual_seed(seed)
        make_model("tiny", "float32", folder, True)
        make_data(folder, 12, rows=6)
        for name in RUNS:  # every fork then finds all it needs loaded
            with redirect_stdout(sys.stderr):
                cli.main(_command(name, folder, "warm", "--total-steps", "1"))
        seconds = {name: _undisturbed(name, folder) for name in RUNS}
        blows = []
        with suppress(KeyboardInterrupt):  # what was measured so far is shown
            for blow in _plan(kills, draw):
                blows.append(_strike(blow, folder, seconds[blow.algorithm], draw))
                print(*_row(len(blows), blows[-1]), sep=" | ", file=sys.stderr, flush=True)
    text = markdown(blows, kills, seed)
    print(text)
    if write:
        write_between(ROOT / "docs/checkpoints.md", "kills", text)
    return not any(blow.differences for blow in blows)


def _plan(kills: int, draw: random.Random) -> Iterator[Blow]:
    """Every second kill at any moment; the others into writing, deleting, the result, and the resumed run's start."""
    aims = ("a write", "a write", "a write", "a deletion", "the result", "a write", "the resumed run")
    for i in range(kills):
        aim = "any moment" if i % 2 == 0 else aims[i // 2 % len(aims)]
        yield Blow(list(RUNS)[i % len(RUNS)] if aim != "a write" else draw.choice(list(RUNS)), signal.SIGKILL, aim)
    for name in ("hydra-ppo", "sft"):
        for number in SIGNALS:
            yield Blow(name, number, "any moment")


class Run:
    """A training run in a forked process; its lines go to a file beside its directory."""

    def __init__(self, algorithm: str, folder: Path, name: str, *words: str) -> None:
        self.place = folder / algorithm / name
        command = _command(algorithm, folder, name, *words)
        self.process = fork(self.place.with_suffix(".log"), lambda: cli.main(command))
        self.code: int | None = None  # of the process, once it has ended; -N: killed by signal N

    def running(self) -> bool:
        if self.code is None:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code is None

    def wait(self) -> int:
        """Its exit code."""
        if self.code is None:
            self.code = _ended(self.process)
        return self.code

    def send(self, number: signal.Signals) -> bool:
        """Strikes and waits for the end; whether it ended by that and not before."""
        if not self.running():
            return False
        os.kill(self.process, number)
        return self.wait() != 0

    def until(self, there: Callable[[], bool], at_most_s: float = WAIT_S) -> None:
        """Looks every tenth of a millisecond; what is waited for may be there for hardly longer."""
        deadline = time.monotonic() + at_most_s
        while self.running() and time.monotonic() < deadline:
            if there():
                return
            time.sleep(1e-4)


def fork(log: Path, work: Callable[[], int]) -> int:
    """The number of a process that does `work`, whose result is its exit code; its output is appended to `log`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)  # makes torch's pool anew, before two threads of the child could both try to
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _command(algorithm: str, folder: Path, name: str, *words: str) -> list[str]:
    """The words behind `rlhf-train`."""
    place, data = folder / algorithm / name, str(folder / "data.jsonl")
    place.parent.mkdir(exist_ok=True)
    inputs = {"eval_prompts": data, "prompts": data, "model": str(folder / "tiny")}
    config = place.with_name("config.yaml")
    config.write_text(json.dumps({**COMMON, **inputs, **RUNS[algorithm]}))  # JSON is YAML
    return [algorithm, "--config", str(config), "--output", str(place), *words]


def _undisturbed(algorithm: str, folder: Path) -> float:
    """Runs it to its end; the seconds from its first line to its last."""
    run = Run(algorithm, folder, "whole")
    run.until(lambda: (run.place / "samples.jsonl").exists())
    begun = time.monotonic()
    if run.wait():
        raise RuntimeError(f"{algorithm}: the undisturbed run failed: {run.place.with_suffix('.log').read_text()}")
    return time.monotonic() - begun


def _strike(blow: Blow, folder: Path, seconds: float, draw: random.Random) -> Blow:
    """Starts a run, strikes, notes what is left, resumes to the end and compares. Anew when the run ended first."""
    place = folder / blow.algorithm / "struck"
    while True:
        shutil.rmtree(place, ignore_errors=True)
        run = Run(blow.algorithm, folder, "struck")
        if blow.aim == "the resumed run":  # as soon as it cuts the log, after a first blow at any moment
            _wait(run, "any moment", seconds, draw)
            if not run.send(signal.SIGKILL):
                continue
            run = Run(blow.algorithm, folder, "struck", "--resume")
        _wait(run, blow.aim, seconds, draw)
        if run.send(blow.number):
            break
    blow.code = run.wait()
    blow.logged = _lines(place)
    blow.left = sorted(
        e.name for e in place.iterdir() if e.name.startswith((".partial", ".result")) or ".tmp" in e.name
    )
    blow.resumed_from = max(_checkpoints(place), default=None)
    if Run(blow.algorithm, folder, "struck", "--resume").wait():
        blow.differences = ["--resume failed: " + place.with_suffix(".log").read_text().splitlines()[-1]]
    else:
        blow.differences = list(differences(place.with_name("whole"), place))
    if blow.number != signal.SIGKILL and blow.code not in (128 + blow.number, -blow.number):  # both 143 to a shell
        blow.differences.append(f"exit code {blow.code}")
    return blow


def _wait(run: Run, aim: str, seconds: float, draw: random.Random) -> None:
    """Returns when it is time to strike, or when the run has ended."""
    place = run.place
    if aim == "any moment":
        after, more = draw.randrange(STEPS + 1), draw.uniform(0, seconds / STEPS)
        run.until(lambda: (place / "samples.jsonl").exists() and _lines(place) >= after)
        time.sleep(more)
    elif aim == "a write":
        after, files = draw.randrange(STEPS - 1), draw.randrange(6)  # of five, and after the last of them
        run.until(lambda: max(_checkpoints(place), default=0) >= after)
        run.until(lambda: any(_count(partial) >= files for partial in place.glob(".partial-checkpoint-*[0-9]")))
    elif aim == "a deletion":
        after = draw.randrange(2, STEPS - 1)
        run.until(lambda: max(_checkpoints(place), default=0) >= after)
        run.until(lambda: any(place.glob(".partial-*-old")))
    elif aim == "the result":
        files = draw.randrange(1, 4)
        run.until(lambda: any(_count(place / name) >= files for name in (".partial-.result", ".result")))
    else:
        run.until(lambda: any(place.glob("*.tmp")))


def _count(directory: Path) -> int:
    """Files in it; -1 when it is not there (any more)."""
    try:
        return sum(1 for _ in directory.iterdir())
    except FileNotFoundError:
        return -1


def _checkpoints(place: Path) -> list[int]:
    return [int(entry.name.partition("-")[2]) for entry in place.glob("checkpoint-*")]


def _lines(place: Path) -> int:
    file = place / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def differences(whole: Path, struck: Path) -> Iterator[str]:
    """The names of files that are not the same in two finished runs; times and bytes in metrics.jsonl do not count."""
    skipped = {"metrics.jsonl", "config.yaml", "state.json", "SHA256SUMS", ".lock"}  # they name the directory or times
    names = [{str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (whole, struck)]
    for name in sorted(names[0] ^ names[1]):
        yield f"{name}: only in one"
    for name in sorted(names[0] & names[1]):
        if Path(name).name not in skipped and _content(whole / name) != _content(struck / name):
            yield name
    if _curve(whole) != _curve(struck):
        yield "metrics.jsonl"


def _content(file: Path) -> Any:
    """Bytes; of safetensors, those of each tensor, as the order of their metadata is drawn anew in each process."""
    if file.suffix != ".safetensors":
        return file.read_bytes()
    return {name: (str(w.dtype), w.shape, w.numpy().tobytes()) for name, w in load_file(file).items()}


def _curve(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def markdown(blows: list[Blow], kills: int, seed: int) -> str:
    """What was done, and the table."""
    struck = sum(blow.number == signal.SIGKILL for blow in blows)
    exact = sum(not blow.differences for blow in blows if blow.number == signal.SIGKILL)
    inside = sum(bool(blow.left) for blow in blows if blow.number == signal.SIGKILL)
    machine = describe("cpu")
    columns = ("", "run", "signal", "aimed at", "lines logged", "left half-done", "exit code", "resumed from", "then")
    return (
        f"`python -m benchmarks kills --kills {kills} --seed {seed}`: {exact} of {struck} resumed runs are exactly the "
        f"undisturbed one; {inside} of the kills struck while files were being written, deleted or moved. "
        f"{machine['cpu']}, torch {versions()['torch']}, commit {commit()}.\n\n"
        + grid(columns, [_row(i, blow) for i, blow in enumerate(blows, 1)])
    )


def _row(number: int, blow: Blow) -> list[str]:
    start = "the beginning" if blow.resumed_from is None else f"checkpoint-{blow.resumed_from}"
    code = str(blow.code) if blow.code >= 0 else "killed"
    left = ", ".join(f"`{name}`" for name in blow.left) or "nothing"
    verdict = "; ".join(blow.differences) or "the same"
    return [str(number), blow.algorithm, blow.number.name, blow.aim, str(blow.logged), left, code, start, verdict]
