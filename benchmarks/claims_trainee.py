"""One algorithm's training in a process of its own, step by step on demand: its live tensors, its peak, its seconds.

The process takes lines of JSON on stdin, {"batch": sequences, "steps": n}, runs so many steps of the trainer with that
batch as rollout, minibatch and micro-batch, and answers each with one line. Processes that wait take no time, so the
steps of several can be interleaved. Bytes are counted above a warmed-up process without a model.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.claims_model import Shape
from benchmarks.machine import ROOT

# With these every larger block is given back as soon as it is freed, so that the resident set is what is held.
EXACT_BYTES = {"MALLOC_MMAP_THRESHOLD_": str(256 * 2**10), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**10)}
PHASES = ("generate", "score", "update")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """What a process trains. `folder`, `tiny`: where the shapes' files are, of the model and of the warm-up's."""

    algorithm: str
    shape: Shape
    folder: str
    tiny_shape: Shape
    tiny: str
    dtype: str = "float32"
    device: str = "cpu"
    reward_model: bool = False  # a reward model apart from the model
    adapters: bool = False  # rank of the shape; else the algorithm trains whole models
    threads: int = 1
    exact: bool = False  # bytes are measured, at some cost in time

    @property
    def name(self) -> str:
        return self.algorithm + (" with its own reward model" if self.reward_model else "")


@dataclass(frozen=True)
class Steps:
    """What some steps took: bytes, and seconds of each step.

    `passes_bytes`: what rollout, scoring, forward and backward took at most above weights and optimiser state;
    `update_bytes`: what the optimiser's step took above static bytes (both 0 unless the job is exact).
    `bases`, `adapters`: copies counted in live tensors. `seconds`: processor time of one thread, wall time otherwise;
    of each phase its share of the wall time.
    """

    batch: int
    static_bytes: int
    peak_bytes: int
    passes_bytes: int
    update_bytes: int
    bases: int
    adapters: int
    seconds: list[float]
    phases: list[dict[str, float]]
    completion_tokens: float


class OutOfMemory(RuntimeError):
    """The device has no room for the steps."""


class Trainee:
    """A process that trains `job`; `exact` measures bytes."""

    def __init__(self, job: Job, exact: bool = False) -> None:
        self.job = job = replace(job, exact=exact)
        command = [sys.executable, "-m", "benchmarks.claims_trainee", json.dumps(asdict(job))]
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "GOMP_SPINCOUNT": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
        environment |= EXACT_BYTES if exact else {}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self) -> "Trainee":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()

    def steps(self, batch: int, steps: int = 1) -> Steps:
        """OutOfMemory where there is no room; RuntimeError with the process's last words where it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        try:
            self.process.stdin.write(json.dumps({"batch": batch, "steps": steps}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.job.name} in {self.job.dtype} failed:\n{self.errors.read()[-2000:]}")
        answer = json.loads(line)
        if answer.get("error") == OUT_OF_MEMORY:
            raise OutOfMemory(f"{self.job.name} with {batch} sequences: {OUT_OF_MEMORY}")
        return Steps(**answer)


# ---- in the process ----------------------------------------------------------------------------------------------


class Training:
    """The trainer's own phase of the job's algorithm, whose batch can be changed between steps."""

    def __init__(self, job: Job, shape: Shape, folder: str) -> None:
        from rlhf_trainer.algorithms import find, with_defaults
        from rlhf_trainer.core import build_phase
        from rlhf_trainer.models import load_tokenizer

        self.job, self.shape, self.done, self.above = job, shape, 0, 0
        self.earlier = _live_parameters()  # of models that are gone for us, if not yet for the collector
        self.static = self.peak = self.passes = self.update = 0
        offline = find(job.algorithm).data is not None
        self.config = with_defaults(self._config(folder, offline).validate())
        self.phase, self.policy = build_phase(self.config, find(job.algorithm), load_tokenizer(self.config))
        self._step_optimizer: Callable[..., dict[str, float]] = self.phase.optimizer.step
        self.phase.optimizer.step = self._counted  # type: ignore[method-assign]

    def _config(self, folder: str, offline: bool) -> Any:
        from rlhf_trainer.config import TrainConfig

        job, shape = self.job, self.shape
        return TrainConfig(
            algorithm=job.algorithm, model=folder, dtype=job.dtype, device=job.device, report=False, save_steps=0,
            prompts=str(Path(folder) / ("demonstrations.jsonl" if offline else "prompts.jsonl")),
            reward_model=folder if job.reward_model else None, lora_r=shape.rank if job.adapters else None,
            max_prompt_length=shape.prompt, max_completion_length=shape.response, num_ppo_epochs=1,
            rollout_batch_size=1, per_device_train_batch_size=1, kv_memory=self._kv(2), num_sample_completions=0,
            output_dir=str(Path(folder) / "never-written"), learning_rate=1e-6,
        )  # fmt: skip

    def _kv(self, sequences: int) -> int:
        return self.shape.kv_bytes(sequences, self.job.dtype)

    def steps(self, batch: int, steps: int, above: int) -> dict[str, Any]:
        """So many steps of `batch` sequences; `above`: the bytes held without a model."""
        from benchmarks import memory

        both = 2 if self.job.algorithm == "remax" else 1  # the sampled and the greedy completion
        config = replace(
            self.config, rollout_batch_size=batch, per_device_train_batch_size=batch, kv_memory=self._kv(both * batch)
        )
        self.phase = replace(self.phase, config=config)
        memory.settle(self.job.device)
        self.above, self.peak = above, 0
        seconds, phases, metrics = [], [], {}
        for _ in range(steps):
            cpu, wall = time.process_time(), time.perf_counter()
            metrics = self.phase.step(self.done)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            self.done += 1
            taken = cpu if self.job.threads == 1 and self.job.device == "cpu" else wall
            seconds.append(taken)
            phases.append({name: metrics.get(f"timing/{name}", 0.0) * taken / wall for name in PHASES})
        peak = max(self.peak, memory.peak_bytes(self.job.device) - above)
        return {
            "batch": batch, "static_bytes": self.static, "peak_bytes": peak, "passes_bytes": self.passes,
            "update_bytes": self.update, **self._copies(), "seconds": seconds, "phases": phases,
            "completion_tokens": metrics.get("completions/mean_length", float(self.shape.response)),
        }  # fmt: skip

    def _counted(self, only: str | None = None) -> dict[str, float]:
        """The optimiser's step, and the bytes of weights, gradients and its state around it."""
        from benchmarks import memory

        gradients = sum(p.grad.nbytes for p in self.policy.model.parameters() if p.grad is not None)
        passes = memory.peak_bytes(self.job.device) - self.above
        if self.job.exact:
            memory.settle(self.job.device)
        metrics = self._step_optimizer(only)
        weights = {p.data_ptr(): p.nbytes for p in self.policy.model.parameters()}
        state = sum(tensor.nbytes for tensor in self.phase.optimizer.state_tensors().values())
        self.static = gradients + sum(weights.values()) + state
        if self.job.exact:
            update = memory.peak_bytes(self.job.device) - self.above
            self.peak = max(self.peak, passes, update)
            self.passes, self.update = passes - (self.static - gradients), update - self.static
        return metrics

    def _copies(self) -> dict[str, int]:
        """Live parameters shaped as the decoder's down projection, and as an adapter's A on it, over the layers."""
        shape = self.shape
        wanted = {"bases": (shape.width, shape.inner), "adapters": (shape.rank, shape.inner)}
        live = [t for t in _live_parameters().values() if id(t) not in self.earlier]
        found = {k: {t.data_ptr() for t in live if tuple(t.shape) == v} for k, v in wanted.items()}
        return {name: len(storages) // shape.layers for name, storages in found.items()}


def _live_parameters() -> dict[int, Any]:
    """Every Parameter there is, by its id."""
    from torch.nn import Parameter

    return {id(t): t for t in gc.get_objects() if type(t) is Parameter}


def job_of(text: str) -> Job:
    values = json.loads(text)
    for name in ("shape", "tiny_shape"):
        values[name] = Shape(**values[name])
    return Job(**values)


def answers(job: Job, requests: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The answer to each request."""
    import torch

    from benchmarks import memory

    torch.set_num_threads(job.threads)
    Training(job, job.tiny_shape, job.tiny).steps(2, 2, 0)
    memory.settle(job.device)
    above = memory.held_bytes(job.device)
    training = Training(job, job.shape, job.folder)
    for request in requests:
        try:
            yield training.steps(above=above, **json.loads(request))
        except torch.OutOfMemoryError:
            yield {"error": OUT_OF_MEMORY}


def main() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for answer in answers(job_of(sys.argv[1]), iter(sys.stdin.readline, "")):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
