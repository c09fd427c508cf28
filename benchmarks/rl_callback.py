"""How transformers' trainers take their turns."""

from typing import Any

from transformers import TrainerCallback

from benchmarks.rl_turns import Turns


class InTurns(TrainerCallback):
    """Begins a step, of `updates` optimiser steps, when told to, and says what it gave: what is logged as `metric`, for
    trainers that log before a step ends, or what was put into `reward`."""

    def __init__(self, turns: Turns, metric: str = "", updates: int = 1) -> None:
        self.turns, self.metric, self.updates, self.reward = turns, metric, updates, float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.reward = float((logs or {}).get(self.metric, self.reward))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.turns.done(self.reward)
            self.turns.wait()
