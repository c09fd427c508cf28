"""The same training on 1, 2 and 4 processes: how far the loss curves and the weights come apart.

Every run is of the demo model in fp32, with the same data, seeds and optimiser steps; the runs differ in how many
processes share a step and in how many micro-batches each cuts its share into. Compared with one of each.
"""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

PROCESSES, ACCUMULATION = (1, 2, 4), (1, 4)
STEPS, BATCH = 8, 16  # BATCH: sequences of an optimiser step
ALGORITHMS = ("hydra-ppo", "remax", "rloo", "dpo", "sft")
TIMED = ("timing/", "memory/", "sampling/tokens_per_second")  # metrics of the machine, not of the run
TIMEOUT_S = 1200

INTRODUCTION = f"""\
Largest difference from one process with one micro-batch, over {STEPS} optimiser steps or rollouts of {BATCH} sequences,
demo model, fp32, gloo; columns: processes x micro-batches of each. Made by `python -m benchmarks processes --write`."""


@dataclass
class Difference:
    """Of one run from the first: the loss in nats, every metric relative to max(1, its size), the weights."""

    loss: float
    metrics: float
    weights: float


def settings(algorithm: str, processes: int, accumulation: int, steps: int = STEPS) -> dict[str, Any]:
    """The run's TrainConfig as plain values, but for where it writes."""
    micro = BATCH // (processes * accumulation)
    common = {
        "algorithm": algorithm, "total_steps": steps, "per_device_train_batch_size": micro, "report": False,
        "learning_rate": 1e-3 if algorithm == "hydra-ppo" else 3e-4, "max_completion_length": 24,
    }  # fmt: skip
    if algorithm in ("dpo", "sft"):
        return common | {"gradient_accumulation_steps": BATCH // micro, "lora_r": 8}
    samples = 4 if algorithm == "rloo" else 1
    common |= {"num_generations": samples, "rollout_batch_size": BATCH // samples, "kv_memory": "4MiB", "lora_r": 8}
    return common | ({"num_ppo_epochs": 2} if algorithm == "hydra-ppo" else {})


def measure(steps: int = STEPS, algorithms: tuple[str, ...] = ALGORITHMS) -> dict[str, dict[str, Difference]]:
    """algorithm -> "processes x accumulation" -> what it differs by."""
    with tempfile.TemporaryDirectory() as folder:
        for count in PROCESSES:
            jobs = []
            for algorithm, accumulation in product(algorithms, ACCUMULATION):
                place = Path(folder) / algorithm / f"{count} x {accumulation}"
                jobs.append(settings(algorithm, count, accumulation, steps) | {"output_dir": str(place)})
            launch(count, jobs, Path(folder) / f"jobs-{count}.json")
        found: dict[str, dict[str, Difference]] = {}
        for algorithm, count, accumulation in product(algorithms, PROCESSES, ACCUMULATION):
            run, first = (Path(folder) / algorithm / name for name in (f"{count} x {accumulation}", "1 x 1"))
            if run != first:
                found.setdefault(algorithm, {})[run.name] = difference(run, first)
    return found


def launch(count: int, jobs: list[dict[str, Any]], file: Path) -> None:
    """Runs the jobs one after the other, each on `count` processes. RuntimeError with their last words."""
    file.write_text(json.dumps(jobs))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(torchrun if count > 1 else []), "-m", "benchmarks.processes", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"training on {count} processes failed:\n{done.stderr[-3000:]}")
    print(f"trained on {count} processes: {len(jobs)} runs", file=sys.stderr, flush=True)


def difference(run: Path, first: Path) -> Difference:
    """Between two runs' metrics and between the weights in their last checkpoints."""
    from safetensors.torch import load_file

    from rlhf_trainer.metrics import METRICS, read_lines

    loss = metrics = 0.0
    mine, theirs = (list(read_lines(folder / METRICS)) for folder in (run, first))
    if [row.keys() for row in mine] != [row.keys() for row in theirs]:
        raise RuntimeError(f"{run.name} recorded other steps or metrics than {first.name}")
    for row, other in zip(mine, theirs):
        for name, value in row.items():
            if not name.startswith(TIMED):
                apart = abs(value - other[name]) if None not in (value, other[name]) else math.inf
                metrics = max(metrics, apart / max(1.0, abs(other[name] or 0.0)))
                if name in ("loss", "loss/policy_avg", "loss/value_avg"):
                    loss = max(loss, apart)
    last = f"checkpoint-{mine[-1]['step']}/model.safetensors"
    weights, expected = load_file(run / last), load_file(first / last)
    return Difference(loss, metrics, max(float((weights[n] - expected[n]).abs().max()) for n in expected))


def markdown(found: dict[str, dict[str, Difference]]) -> str:
    """One table a quantity."""
    from benchmarks.tables import grid

    parts = [INTRODUCTION]
    for quantity, title in (
        ("loss", "Loss (policy and value)"),
        ("metrics", "Every metric, relative where it is above 1"),
        ("weights", "Trained weights after the last step"),
    ):
        columns = list(next(iter(found.values())))
        rows = [
            [name, *(f"{getattr(runs[column], quantity):.0e}" for column in columns)] for name, runs in found.items()
        ]
        parts += [f"**{title}**", grid(("", *columns), rows)]
    return "\n\n".join(parts)


def main() -> None:
    """In a process of its own, or in several: the jobs of a file."""
    from rlhf_trainer import TrainConfig, train

    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(TrainConfig(**job))


if __name__ == "__main__":
    main()
