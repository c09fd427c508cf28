"""A trainer in a process of its own: it takes a step when it is told to, and says what the step gave and cost.

The trainer's side (`Turns`) and the benchmark's (`Process`) talk in lines of JSON over the trainer's standard input and
output; what the trainer's library prints goes to standard error instead.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rl_task import DIRECTORY

ROOT = Path(__file__).resolve().parent.parent
MISSING = 3  # exit status of a trainer whose library is not there


@dataclass(frozen=True)
class Turn:
    """What a step gave: the mean reward of its completions (or its loss), processor seconds, and the process's peak so
    far in bytes above what it held with its libraries imported and no model loaded. Of the seconds, those that sampling
    took, where it was noted."""

    reward: float
    cpu_s: float
    peak_bytes: int
    sampling_s: float = 0.0


class Turns:
    """Made by the trainer's process when its imports are done and before it loads a model."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        with contextlib.suppress(OSError):  # Linux lets a process set its peak back to what is resident now
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _peak_bytes()
        self.started = 0.0

    def wait(self) -> None:
        """Says that all is done, and waits until it is this trainer's turn; ends the process when none will come."""
        self._say({"waiting": True})
        if not sys.stdin.readline():
            os._exit(0)
        self.started = time.process_time()

    def done(self, reward: float, sampling_s: float = 0.0) -> None:
        turn = Turn(reward, time.process_time() - self.started, _peak_bytes() - self.before, sampling_s)
        self._say({"turn": asdict(turn)})

    def _say(self, words: dict[str, object]) -> None:
        print(json.dumps(words), file=self.out, flush=True)


class Missing(Exception):
    """The trainer's interpreter or its library is not there."""


class Process:
    """The benchmark's side: `python -m module` with the task's directory in its environment, ready for its first step.

    Raises Missing, or RuntimeError with the process's last words where it fails.
    """

    def __init__(self, python: str | Path, module: str, directory: Path, settings: dict[str, object]) -> None:
        if not Path(python).exists():
            raise Missing(str(python))
        environment = os.environ | {DIRECTORY: str(directory), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close; a pipe that nobody reads would fill up)
        self.child = subprocess.Popen(
            [str(python), "-W", "ignore", "-m", module, json.dumps(settings)], cwd=ROOT, text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self._hear("waiting")

    def step(self) -> Turn:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        return Turn(**self._hear("turn"))

    def close(self) -> None:
        """Lets the process end."""
        if self.child.stdin is not None and not self.child.stdin.closed:
            self.child.stdin.close()
        self.child.wait()
        self.errors.close()

    def _hear(self, word: str) -> Any:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            said = json.loads(line)
            if word in said:
                return said[word]
        code = self.child.wait()
        if code == MISSING:
            raise Missing(self.child.args[0])  # type: ignore[index]
        self.errors.seek(0)
        words = self.errors.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError("\n".join([words[-1] if words else f"ended with status {code}", *words[-12:]]))


def _peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
