"""One step of the algorithms that learn from a file: micro-batches of a batch, then one optimiser step."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_kernels.nn import HydraModel
from rlhf_trainer.algorithms import Algorithm, Counts
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.data import BatchOrder, Demonstration, Prompt
from rlhf_trainer.errors import UserError
from rlhf_trainer.optim import Optimizer
from rlhf_trainer.processes import ALONE, Processes, summed
from rlhf_trainer.sampler import Sampler

Prepare = Callable[[HydraModel, list[Any], TrainConfig], list[Any]]


@dataclass
class Offline:
    """The parts of a run that learns from `rows`, which are demonstrations or preferences.

    sampler: with it, evaluations let the policy complete `eval_prompts` and score what it says.
    """

    model: HydraModel
    row: Algorithm
    config: TrainConfig
    optimizer: Optimizer
    rows: list[Any]
    sampler: Sampler | None = None
    eval_prompts: list[Prompt] = field(default_factory=list)
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        batch = self.config.micro_batch * self.config.gradient_accumulation_steps
        self.processes.check("gradient_accumulation_steps", batch, "rows of an optimiser step")
        self.order = BatchOrder(len(self.rows), batch, self.config.seed)
        check_rows(self.rows, self.model.base_model(self.row.trained[0]))
        if self.sampler is not None:
            self.sampler.check(self.eval_prompts, self.sampler.params(n=1))
        if self.row.prepare is not None:
            self.rows = self._prepared(self.row.prepare)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The first completions of the last evaluation."""
        return [] if self.sampler is None else self.sampler.samples

    def step(self, step: int) -> dict[str, float]:
        """Step number `step` (from 0); returns its metrics."""
        started = time.perf_counter()
        if self.sampler is not None:
            self.sampler.samples = []  # the last evaluation's are not this step's
        batch = [self.rows[i] for i in self.order.at(step)]
        tokens = sum(completion_tokens(row) for row in batch)
        counts = Counts(float(tokens), float(len(batch)))
        linked = self.model.sharding is not None
        totals = summed(self.processes.each(lambda: self._differentiate(batch, counts), linked))
        totals |= self.optimizer.step()
        return totals | {"num_tokens": float(tokens), "timing/update": time.perf_counter() - started}

    def _differentiate(self, rows: list[Any], counts: Counts) -> dict[str, float]:
        """Gradients of this process's share of a batch, in micro-batches; its share of the metrics."""
        totals: dict[str, float] = {}
        mine, even = rows[self.processes.share(len(rows))], self.model.sharding is not None
        for part, counted in self.processes.pieces(mine, self.config.micro_batch, len(rows), even):
            share = self.row.loss(self.model, part, counts, self.config)
            (share.value if counted else 0.0 * share.value).backward()
            for name, value in share.metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value) * counted
        return totals

    def _prepared(self, prepare: Prepare) -> list[Any]:
        """The rows as `prepare` gives them, each process its share: whole micro-batches, so that they are the same."""
        size = self.config.micro_batch
        blocks = -(-len(self.rows) // size)
        share = self.processes.share(blocks)
        mine = self.rows[share.start * size : share.stop * size]
        lacking = -(-blocks // self.processes.count) - (share.stop - share.start)  # of the largest share's
        linked = self.model.sharding is not None
        more = self.rows[:size] * lacking if linked else []
        parts = self.processes.each(lambda: prepare(self.model, more + mine, self.config)[len(more) :], linked)
        return [row for part in parts for row in part]

    def evaluate(self) -> dict[str, float]:
        """Reward, KL and length on the held-out prompts; {} without a reward to score them by."""
        return {} if self.sampler is None else self.sampler.evaluate(self.eval_prompts)

    def state(self) -> dict[str, Any]:
        """Nothing beyond the tensors and the position."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


def check_rows(rows: Sequence[Any], base: Any) -> None:
    """UserError for tokens and lengths that transformers model `base` has no embedding for."""
    vocabulary = len(base.get_input_embeddings().weight)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    for row in rows:
        for sequence in _sequences(row):
            if max(sequence) >= vocabulary:
                raise UserError(
                    f"model: its tokenizer made token {max(sequence)}; its vocabulary is 0 to {vocabulary - 1}"
                )
            if positions is not None and len(sequence) > positions:
                raise UserError(
                    f"prompts: a row has {len(sequence)} tokens, above the model's max_position_embeddings of "
                    f"{positions}; a smaller max_prompt_length or max_completion_length cuts it"
                )


def _sequences(row: Any) -> list[list[int]]:
    """Prompt and completion in one list, for each completion of a row."""
    ends = [row.completion] if isinstance(row, Demonstration) else [row.chosen, row.rejected]
    return [row.prompt + end for end in ends]


def completion_tokens(row: Any) -> int:
    """Tokens that carry cross-entropy: without a prompt the first one has nothing to be predicted from."""
    completion = row.completion if isinstance(row, Demonstration) else row.chosen
    return len(completion) if row.prompt else len(completion) - 1
