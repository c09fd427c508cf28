"""Whole trainers: a step of RLHF, from prompts to updated adapters, ours beside TRL's of the same task and settings.

Every trainer runs in a process of its own and takes its steps in turns with the others; the first step of each warms it
up. PPO's peer is TRL 0.29.1, the last version with PPO, whose environment `make .venv/.trl` makes; another one's python
is named by RLHF_BENCHMARK_TRL_PYTHON. RLOO's peer is the TRL installed here.
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.case import OURS, Case, Measure, Prepare, Run, Target, Unavailable
from benchmarks.machine import ROOT
from benchmarks.rl_task import Task
from benchmarks.rl_turns import Missing, Process, Turn

PYTHON = "RLHF_BENCHMARK_TRL_PYTHON"
DTYPES = ("float32", "bfloat16")
PPO = Task(samples=32, mini_batches=2, epochs=4)
RLOO = replace(PPO, generations=4, mini_batches=1, epochs=1)
KV_MEMORY = "128MiB"
TARGETS = (Target("TRL", at_least=1.5), Target("TRL", "memory", at_most=0.4))
ROUNDS = 2


@dataclass(frozen=True)
class Trainer:
    """How a contestant is started: `python -m module`, with its settings."""

    module: str
    settings: dict[str, object] = field(default_factory=dict)
    python: str = sys.executable


def old_trl() -> str:
    """The python of the environment with TRL 0.29.1."""
    return os.environ.get(PYTHON) or str(ROOT / ".venv/.trl/bin/python")


def ppo() -> dict[str, Trainer]:
    trl = partial(Trainer, "benchmarks.rl_trl_ppo", python=old_trl())
    return {
        OURS: Trainer("benchmarks.rl_ours", {"algorithm": "hydra-ppo", "kv_memory": KV_MEMORY}),
        "rlhf_kernels, lora-ppo": Trainer("benchmarks.rl_ours", {"algorithm": "lora-ppo", "kv_memory": KV_MEMORY}),
        "TRL 0.29.1 PPO": trl({"rows": PPO.samples}),
        "TRL 0.29.1 PPO, half at a time": trl({"rows": PPO.samples // 2}),
    }


def rloo() -> dict[str, Trainer]:
    return {
        OURS: Trainer("benchmarks.rl_ours", {"algorithm": "rloo", "kv_memory": KV_MEMORY}),
        "TRL 1.16.0 RLOO": Trainer("benchmarks.rl_trl_rloo"),
    }


def cases(device: str = "cpu") -> Iterator[Case]:
    if device != "cpu":
        return  # what its trainers hold is measured as the process's resident set
    for name, task, trainers in (("PPO with LoRA", PPO, ppo()), ("RLOO with LoRA", RLOO, rloo())):
        for dtype in DTYPES:
            yield _case(name, replace(task, dtype=dtype), trainers)


def _case(name: str, task: Task, trainers: dict[str, Trainer]) -> Case:
    group = Group({})

    def build(tiny: bool) -> dict[str, Prepare]:
        group.begin(task.tiny() if tiny else task)
        return {who: partial(group.start, who, trainer) for who, trainer in trainers.items()}

    updates = f"{task.mini_batches} update{'s' * (task.mini_batches > 1)}"
    epochs = f"{task.epochs} epoch{'s' * (task.epochs > 1)} of {updates}"
    text = (
        f"{name}, {task.dtype}: {task.samples} samples of {task.prompt_tokens} + {task.new_tokens} tokens, {epochs}, "
        f"{task.micro_batch} a micro-batch"
    )
    tokens = dict.fromkeys(trainers, task.samples * task.new_tokens)
    return Case(
        text, build, next(who for who in trainers if who.startswith("TRL")), targets=TARGETS, memory=False,
        budget_s=300.0, least_rounds=ROUNDS, rounds=ROUNDS, tokens=tokens, warmed=True,
        measured=lambda: group.measures(task.samples),
    )  # fmt: skip


@dataclass
class Group:
    """The processes of one case and what their steps gave; the first step of each is not timed."""

    turns: dict[str, list[Turn]]
    processes: list[Process] = field(default_factory=list)
    place: tempfile.TemporaryDirectory | None = None

    def begin(self, task: Task) -> None:
        self.end()
        self.turns.clear()
        self.place = tempfile.TemporaryDirectory()
        task.write(Path(self.place.name))

    def start(self, who: str, trainer: Trainer) -> Run:
        assert self.place is not None
        try:
            process = Process(trainer.python, trainer.module, Path(self.place.name), trainer.settings)
        except Missing as error:
            raise Unavailable("not installed") from error
        self.processes.append(process)
        turns = self.turns.setdefault(who, [])

        def run() -> None:
            turns.append(process.step())

        run()
        return run

    def measures(self, samples: int) -> dict[str, Measure]:
        """What the processes told, which end with this."""
        self.end()
        return {who: _measure(samples, turns) for who, turns in self.turns.items() if turns}

    def end(self) -> None:
        for process in self.processes:
            process.close()
        self.processes.clear()
        if self.place is not None:
            self.place.cleanup()
            self.place = None


def _measure(samples: int, turns: list[Turn]) -> Measure:
    figures = {
        "CPU s/sample": f"{statistics.median(turn.cpu_s for turn in turns[1:] or turns) / samples:.3f}",
        "reward": f"{turns[0].reward:.2f} to {turns[-1].reward:.2f}",
    }
    return Measure(turns[-1].peak_bytes, figures)
