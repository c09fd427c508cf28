"""TRL's trainers as they are, and the same ones after `rlhf_kernels.integrations.trl.patch`: time, memory, losses.

Each runs in a process of its own and takes its steps in turns with the others; the first step warms it up. Same model,
data, settings and random numbers for both; gradient checkpointing is on, as it is by TRL's defaults.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.case import OURS, Case, Measure, Prepare, Target
from benchmarks.rl import Group, Trainer
from benchmarks.rl_task import Task
from benchmarks.rl_turns import Turn

THEIRS = "TRL"
SEQUENCES = Task(vocabulary=32768, prompt_tokens=64, new_tokens=192, samples=8, micro_batch=8, mini_batches=1, epochs=1)
SAMPLES = replace(SEQUENCES, prompt_tokens=32, new_tokens=64, samples=16, micro_batch=16, generations=4)
TARGETS = (Target(THEIRS, "memory", at_most=0.7),)
ROUNDS = 2


@dataclass(frozen=True)
class Work:
    """A trainer of TRL's, whether it trains adapters, and what it is given."""

    kind: str
    lora: bool
    task: Task

    @property
    def name(self) -> str:
        task, what = self.task, "LoRA" if self.lora else "whole model"
        return (
            f"{self.kind.upper()}, {what}, {task.dtype}: {task.samples} sequences of {task.prompt_tokens} + "
            f"{task.new_tokens} tokens, vocabulary {task.vocabulary}"
        )


WORKS = (
    Work("sft", False, SEQUENCES),
    Work("sft", True, SEQUENCES),
    Work("sft", True, replace(SEQUENCES, dtype="bfloat16")),
    Work("dpo", True, SEQUENCES),
    Work("grpo", True, SAMPLES),
    Work("rloo", True, SAMPLES),
)


def cases(device: str = "cpu") -> Iterator[Case]:
    if device != "cpu":
        return  # what its trainers hold is measured as the process's resident set
    for work in WORKS:
        yield _case(work)


def _case(work: Work) -> Case:
    group = Steps({})

    def build(tiny: bool) -> dict[str, Prepare]:
        group.begin(work.task.tiny() if tiny else work.task)
        settings = {"kind": work.kind, "lora": work.lora}
        return {
            who: partial(group.start, who, Trainer("benchmarks.trl_trainee", settings | {"patched": who == OURS}))
            for who in (OURS, THEIRS)
        }

    return Case(
        work.name, build, THEIRS, targets=TARGETS, memory=False, budget_s=600.0, least_rounds=ROUNDS, rounds=ROUNDS,
        warmed=True, measured=lambda: group.measures(work.task.samples),
    )  # fmt: skip


class Steps(Group):
    """The processes of one case."""

    def measures(self, samples: int) -> dict[str, Measure]:
        self.end()
        return {who: _measure(turns) for who, turns in self.turns.items() if turns}


def _measure(turns: list[Turn]) -> Measure:
    timed = turns[1:] or turns
    figures = {"CPU s a step": f"{statistics.median(turn.cpu_s for turn in timed):.2f}"}
    if any(turn.sampling_s for turn in timed):
        figures["without sampling"] = f"{statistics.median(turn.cpu_s - turn.sampling_s for turn in timed):.2f}"
    figures["loss"] = f"{turns[0].reward:.5f} to {turns[-1].reward:.5f}"
    return Measure(turns[-1].peak_bytes, figures)
