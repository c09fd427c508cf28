"""Bytes and seconds of one algorithm, measured in a process of its own, beside what `plan` foresaw.

    python -m rlhf_trainer.demo.measure ALGORITHM BASE

Static bytes are those of live tensors (weights, gradients at the optimiser's step, its state). The peak is the growth
of the process's resident set over a warmed-up process without a model: a first short run loads code and libraries.
"""

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEPS = 3  # the first warms caches up; the time is the least of the others
TIMINGS = ("timing/generate", "timing/score", "timing/update")


@dataclass
class Measured:
    """Bytes, seconds a sample, and the mean tokens of a prompt and a completion they were measured with."""

    algorithm: str
    static_bytes: int
    peak_bytes: int
    seconds_per_sample: float
    batch: int
    prompt_tokens: int
    completion_tokens: int


def measure(algorithm: str, base: Path) -> Measured:
    """Run STEPS steps of `algorithm` in this process, which should do nothing else before or after."""
    run_steps(algorithm, base, 1)
    settle()
    before = resident("VmRSS")
    found, phase = run_steps(algorithm, base, STEPS)
    peak = resident("VmHWM") - before
    tokens = [len(p.tokens) for p in phase.prompts]
    batch = phase.config.rollout_batch_size
    return Measured(
        algorithm=algorithm,
        static_bytes=found["static"],
        peak_bytes=peak,
        seconds_per_sample=min(found["seconds"][1:]) / batch,
        batch=batch,
        prompt_tokens=round(sum(tokens) / len(tokens)),
        completion_tokens=round(found["length"]),
    )


def run_steps(algorithm: str, base: Path, steps: int) -> tuple[dict[str, Any], Any]:
    """The demo's own configuration for so many steps; nothing is written."""
    from rlhf_trainer.algorithms import find, with_defaults
    from rlhf_trainer.core import build_phase
    from rlhf_trainer.demo.settings import online
    from rlhf_trainer.models import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        config = with_defaults(online(algorithm, base, Path(folder), total_steps=max(steps, 2)).validate())
        phase, policy = build_phase(config, find(algorithm), load_tokenizer(config))
    found: dict[str, Any] = {"static": 0, "seconds": [], "length": 0.0}
    step_optimizer = phase.optimizer.step

    def stepped(only: str | None = None) -> dict[str, float]:
        gradients = sum(nbytes(p.grad) for p in policy.model.parameters() if p.grad is not None)
        metrics = step_optimizer(only)
        weights = {p.data_ptr(): nbytes(p) for p in policy.model.parameters()}
        state = sum(nbytes(t) for t in tensors(phase.optimizer.adam.state))
        found["static"] = max(found["static"], gradients + sum(weights.values()) + state)
        return metrics

    phase.optimizer.step = stepped  # type: ignore[method-assign]
    for step in range(steps):
        metrics = phase.step(step)
        found["seconds"].append(sum(metrics[name] for name in TIMINGS))
        found["length"] = metrics["completions/mean_length"]
    return found, phase


def tensors(state: Any) -> Iterator[Any]:
    """Every tensor inside an optimiser's state."""
    for values in state.values():
        yield from (value for value in values.values() if hasattr(value, "element_size"))


def nbytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def settle() -> None:
    """Give freed memory back to the system and start the peak anew (Linux)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; 0 where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def in_fresh_process(algorithm: str, base: Path) -> Measured:
    """`measure` in a new process."""
    command = [sys.executable, "-m", "rlhf_trainer.demo.measure", algorithm, str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"measuring {algorithm} failed: {last[0]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(json.dumps(asdict(measure(sys.argv[1], Path(sys.argv[2])))))


if __name__ == "__main__":
    main()
