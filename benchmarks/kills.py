"""Kills training runs with signal 9 at random moments, resumes each, and compares it with a run that nobody disturbed.

The runs are the command line's own, in processes of their own, on the embedded model. Half of the kills come at any
moment of the training; the others wait until the files of a checkpoint (or of the result) are being written or deleted.
After the kills come a few SIGINT and SIGTERM. What must be the same to the bit: the last checkpoint's weights,
optimiser state and generators, the result for other programs, samples.jsonl, and metrics.jsonl without times and bytes.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, commit, describe, versions
from benchmarks.tables import grid, write_between

STEPS = 10
TIMED = ("timing/", "memory/", "sampling/tokens_per_second")
COMMON = {
    "model": "demo", "total_steps": STEPS, "save_steps": 1, "eval_steps": 4, "rollout_batch_size": 8,
    "per_device_train_batch_size": 4, "max_completion_length": 16, "kv_memory": "2MiB", "report": False,
}  # fmt: skip
# adapters with an adaptive KL coefficient; whole models with running statistics; a snapshot in mid-round; no rollouts
RUNS: dict[str, dict[str, Any]] = {
    "hydra-ppo": {"kl_controller": "adaptive", "lr_scheduler_type": "cosine"},
    "ppo-max": {"num_mini_batches": 2},
    "inpo": {"rounds": 3},
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
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seconds = {name: _undisturbed(name, folder) for name in RUNS}
        blows = []
        for blow in _plan(kills, draw):
            blows.append(_strike(blow, folder, seconds[blow.algorithm], draw))
            print(_row(len(blows), blows[-1]), file=sys.stderr, flush=True)
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
    for name in RUNS:
        for number in SIGNALS:
            yield Blow(name, number, "any moment")


def _undisturbed(algorithm: str, folder: Path) -> float:
    """Runs it to its end; the seconds from its first line to its last checkpoint."""
    process = _start(algorithm, folder, "whole")
    _until(process, lambda: (folder / algorithm / "whole" / "samples.jsonl").exists())
    begun = time.monotonic()
    if process.wait():
        raise RuntimeError(f"{algorithm}: the undisturbed run failed with code {process.returncode}")
    return time.monotonic() - begun


def _strike(blow: Blow, folder: Path, seconds: float, draw: random.Random) -> Blow:
    """Starts a run, strikes, notes what is left, resumes to the end and compares. Anew when the run ended first."""
    place = folder / blow.algorithm / "struck"
    while True:
        subprocess.run(["rm", "-rf", str(place)], check=True)
        process = _start(blow.algorithm, folder, "struck")
        if blow.aim == "the resumed run":  # it is struck in its first seconds, after a first blow at any moment
            _wait(process, "any moment", place, seconds, draw)
            _send(process, signal.SIGKILL)
            process = _start(blow.algorithm, folder, "struck", "--resume")
        _wait(process, blow.aim, place, seconds, draw)
        if _send(process, blow.number):
            break
    blow.code = process.returncode
    blow.logged = _lines(place)
    blow.left = sorted(entry.name for entry in place.iterdir() if entry.name.startswith((".partial", ".result")))
    blow.resumed_from = max(_checkpoints(place), default=None)
    if _start(blow.algorithm, folder, "struck", "--resume").wait():
        blow.differences = ["--resume failed"]
    else:
        blow.differences = list(differences(place.with_name("whole"), place))
    if blow.number != signal.SIGKILL and blow.code != 128 + blow.number:
        blow.differences.append(f"exit code {blow.code}")
    return blow


def _start(algorithm: str, folder: Path, name: str, *words: str) -> "subprocess.Popen[bytes]":
    settings = {**COMMON, **RUNS[algorithm]}
    place = folder / algorithm / name
    place.parent.mkdir(exist_ok=True)
    config = place.with_name("config.yaml")
    config.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "rlhf_trainer", algorithm, "--config", str(config), "--output", str(place), *words]
    with place.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _wait(process: "subprocess.Popen[bytes]", aim: str, place: Path, seconds: float, draw: random.Random) -> None:
    """Returns when it is time to strike, or when the process has ended."""
    if aim == "any moment":
        _until(process, lambda: (place / "samples.jsonl").exists())
        time.sleep(draw.uniform(0, seconds))
    elif aim == "a write":
        after, files = draw.randrange(STEPS - 1), draw.randrange(6)  # of five, and after the last of them
        _until(process, lambda: max(_checkpoints(place), default=0) >= after)
        _until(process, lambda: any(_count(p) >= files for p in place.glob(".partial-checkpoint-*[0-9]")))
    elif aim == "a deletion":
        after = draw.randrange(2, STEPS - 1)
        _until(process, lambda: max(_checkpoints(place), default=0) >= after)
        _until(process, lambda: any(place.glob(".partial-*-old")))
    elif aim == "the result":
        files = draw.randrange(1, 4)
        _until(process, lambda: any(_count(place / name) >= files for name in (".partial-.result", ".result")))
    else:
        _until(process, lambda: not any(place.glob(".partial-*")) and (place / "samples.jsonl.tmp").exists(), 20.0)


def _until(process: "subprocess.Popen[bytes]", there: Callable[[], bool], at_most_s: float = WAIT_S) -> None:
    """Looks without pause: what is waited for may be there for less than a millisecond."""
    deadline = time.monotonic() + at_most_s
    while process.poll() is None and time.monotonic() < deadline:
        if there():
            return


def _send(process: "subprocess.Popen[bytes]", number: signal.Signals) -> bool:
    """Strikes and waits for the end; whether it ended by that and not before."""
    if process.poll() is not None:
        return False
    process.send_signal(number)
    return process.wait() != 0


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
    last = f"checkpoint-{STEPS}"
    skipped = {"metrics.jsonl", "config.yaml", f"{last}/state.json", f"{last}/SHA256SUMS"}  # they name the directory
    names = [{str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} for run in (whole, struck)]
    for name in sorted(names[0] ^ names[1]):
        yield f"{name}: only in one"
    for name in sorted((names[0] & names[1]) - skipped - {".lock"}):
        if (whole / name).read_bytes() != (struck / name).read_bytes():
            yield name
    if _curve(whole) != _curve(struck):
        yield "metrics.jsonl"


def _curve(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def markdown(blows: list[Blow], kills: int, seed: int) -> str:
    """What was done, and the table."""
    exact = sum(not blow.differences for blow in blows if blow.number == signal.SIGKILL)
    inside = sum(bool(blow.left) for blow in blows if blow.number == signal.SIGKILL)
    machine = describe("cpu")
    columns = ("", "run", "signal", "aimed at", "lines logged", "left half-done", "exit code", "resumed from", "then")
    return (
        f"`python -m benchmarks kills --kills {kills} --seed {seed}`: {exact} of {kills} resumed runs are exactly the "
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
