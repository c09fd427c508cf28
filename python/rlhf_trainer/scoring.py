"""Reward functions called while the rollout runs: on one group of prompts after the other, each as soon as it is whole.

Groups are consecutive prompts and are scored in their order, so what a function sees does not depend on which
completion happened to finish first, nor on the KV budget.
"""

import time
from collections.abc import Callable, Sequence

from rlhf_kernels import generation
from rlhf_trainer.data import Prompt
from rlhf_trainer.rewards import RewardSum


class EarlyScores:
    """Scores of a rollout's completions, `size` prompts a call. `seconds`: spent in the rewards so far."""

    def __init__(
        self,
        rewards: RewardSum,
        prompts: Sequence[Prompt],
        decode: Callable[[list[int]], str],
        rollouts: int,
        size: int,
    ) -> None:
        self.rewards, self.prompts, self.decode = rewards, prompts, decode
        self.rollouts, self.size = rollouts, size  # completions a prompt, prompts a call
        self.scores: dict[tuple[int, int], float] = {}  # by (prompt_index, sample_index)
        self.seconds = 0.0
        self._waiting: dict[int, list[generation.Rollout]] = {}  # by group
        self._next = 0
        self._sums: dict[str, float] = {}

    def add(self, row: generation.Rollout) -> None:
        """One more completion; calls the rewards for every group that is whole and whose turn it is."""
        self._waiting.setdefault(row.prompt_index // self.size, []).append(row)
        while self._next in self._waiting and len(self._waiting[self._next]) == self._wanted(self._next):
            self._score(self._waiting.pop(self._next))
            self._next += 1

    def _wanted(self, group: int) -> int:
        return self.rollouts * min(self.size, len(self.prompts) - group * self.size)

    def _score(self, rows: list[generation.Rollout]) -> None:
        started = time.perf_counter()
        rows = sorted(rows, key=lambda row: (row.prompt_index, row.sample_index))
        found = score(
            self.rewards, [self.prompts[row.prompt_index] for row in rows], [self.decode(r.tokens) for r in rows]
        )
        self.scores |= {(row.prompt_index, row.sample_index): value for row, value in zip(rows, found)}
        for name, mean in self.rewards.last.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * len(rows)
        self.rewards.last = {name: total / len(self.scores) for name, total in self._sums.items()}
        self.seconds += time.perf_counter() - started


def score(rewards: RewardSum, prompts: Sequence[Prompt], completions: list[str]) -> list[float]:
    """One call of the rewards: a prompt for every completion, with its columns."""
    names = {name: None for prompt in prompts for name in prompt.columns}
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return rewards([prompt.text for prompt in prompts], completions, columns)
