"""Rows to tokens: prompts, preferences and demonstrations from JSONL files or `datasets` names.

A row's prompt is text (`prompt`) or a chat (`messages`, or a list of messages in `prompt`), rendered by the tokenizer's
template. Prompt and completion are tokenised apart, because the policy too continues after the prompt's own tokens.
A prompt longer than `max_prompt_length` is cut on the left, dropped or refused (`prompt_truncation`), with a warning.
"""

import random
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .config import TrainConfig
from .errors import UserError
from .rows import Rows


@dataclass
class Prompt:
    """One prompt to complete; `columns` are the row's other columns, which reward functions receive."""

    text: str
    tokens: list[int]
    columns: dict[str, Any]


@dataclass
class Preference:
    """Tokens of a prompt and of its better and worse completion, each completion ending in end-of-sequence."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    ref_logprobs: tuple[float, float] | None = None  # the reference's, of chosen and rejected, when precomputed


@dataclass
class Demonstration:
    """Tokens of a prompt (may be empty) and of the completion to imitate, ending in end-of-sequence."""

    prompt: list[int]
    completion: list[int]


class BatchOrder:
    """Which rows make batch `step`: epochs of seeded shuffles laid end to end, a pure function of the step.

    Nothing is carried from one step to the next, so a resumed run needs no state to see the same rows.
    """

    def __init__(self, n: int, batch: int, seed: int = 0) -> None:
        if n < 1 or batch < 1:
            raise UserError(f"batch order: needs at least one row and one row a batch, got n={n}, batch={batch}")
        self.n, self.batch, self.seed = n, batch, seed
        self._shuffle = lru_cache(maxsize=4)(self._shuffled)

    def at(self, step: int) -> list[int]:
        """Row numbers of batch `step` (from 0); a batch may straddle two epochs."""
        first = step * self.batch
        return [self._shuffle(i // self.n)[i % self.n] for i in range(first, first + self.batch)]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self.n))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


def load_prompts(config: TrainConfig, tokenizer: Any, which: str = "prompts") -> list[Prompt]:
    """The prompts of `config.prompts` (or `config.eval_prompts`); [] when there is no such set.

    A chat that ends with the assistant's answer is cut before it. UserError names the file, the line and what is wrong.
    """
    source = _source(config, which, which)
    if source is None:
        return []
    rows = Rows(source, config)
    prompts: list[Prompt] = []
    length = _LengthRule(config, source)
    for place, row in rows:
        text = rows.prompt_text(place, row, tokenizer)
        if not text.strip():
            raise UserError(f"{place}: the prompt is empty")
        tokens = _encode_prompt(tokenizer, text, rows.is_chat(row))
        if (kept := length(place, tokens)) is not None:
            prompts.append(Prompt(text, kept, {k: v for k, v in row.items() if k != config.prompt_column}))
    length.finish(len(prompts))
    return prompts


def load_preferences(config: TrainConfig, tokenizer: Any) -> list[Preference]:
    """Rows with `prompt`, `chosen`, `rejected` (texts, or lists of messages). Pairs equal once cut are dropped."""
    source = _source(config, "prompts", "preferences")
    assert source is not None
    rows = Rows(source, config)
    pairs: list[Preference] = []
    length = _LengthRule(config, source)
    equal = 0
    for place, row in rows:
        text = rows.prompt_text(place, row, tokenizer)
        if not text.strip():
            raise UserError(f"{place}: the prompt is empty")
        answers = [rows.answer_text(place, row, column, text, tokenizer) for column in ("chosen", "rejected")]
        tokens = _encode_prompt(tokenizer, text, rows.is_chat(row))
        if (prompt := length(place, tokens)) is None:
            continue
        chosen, rejected = (_encode_answer(tokenizer, a, config.max_completion_length) for a in answers)
        if chosen == rejected:
            equal += 1
            continue
        pairs.append(Preference(prompt, chosen, rejected))
    if equal:
        warnings.warn(
            f"{source}: {equal} pairs dropped: chosen and rejected are equal within "
            f"max_completion_length={config.max_completion_length} tokens",
            stacklevel=2,
        )
    length.finish(len(pairs))
    return pairs


def load_demonstrations(config: TrainConfig, tokenizer: Any, which: str = "prompts") -> list[Demonstration]:
    """Rows with `prompt` and `completion`, with `text` alone (then the prompt is empty), or with `messages`."""
    source = _source(config, which, "demonstrations")
    assert source is not None
    rows = Rows(source, config)
    result: list[Demonstration] = []
    length = _LengthRule(config, source)
    for place, row in rows:
        prompt, completion = rows.demonstration(place, row, tokenizer)
        if not completion.strip():
            raise UserError(f"{place}: the completion is empty")
        tokens = _encode_prompt(tokenizer, prompt, rows.is_chat(row)) if prompt else _start(tokenizer)
        if (kept := length(place, tokens)) is not None:
            result.append(Demonstration(kept, _encode_answer(tokenizer, completion, config.max_completion_length)))
    length.finish(len(result))
    return result


def _source(config: TrainConfig, which: str, demo_set: str) -> str | None:
    """The set that `which` names; the demo's own where the model is the demo's and no other prompts are given."""
    named: str | None = getattr(config, which)
    if named is not None:
        return named
    if config.model == "demo" and config.prompts is None:
        from .demo import data_path

        return str(data_path(demo_set))
    if which == "prompts":
        raise UserError("prompts: needed (a JSONL file or a `datasets` name) with any model other than demo")
    return None


class _LengthRule:
    """Prompts longer than `max_prompt_length`: cut on the left, dropped (None) or refused, and counted."""

    def __init__(self, config: TrainConfig, source: str) -> None:
        self.limit, self.policy, self.source = config.max_prompt_length, config.prompt_truncation, source
        self.count = 0

    def __call__(self, place: str, tokens: list[int]) -> list[int] | None:
        if len(tokens) <= self.limit:
            return tokens
        if self.policy == "error":
            raise UserError(
                f"{place}: the prompt has {len(tokens)} tokens, max_prompt_length is {self.limit} "
                "(prompt_truncation=left or drop accepts it)"
            )
        self.count += 1
        return tokens[-self.limit :] if self.policy == "left" else None

    def finish(self, kept: int) -> None:
        if self.count:
            done = "cut on the left" if self.policy == "left" else "dropped"
            warnings.warn(f"{self.source}: {self.count} prompts over {self.limit} tokens were {done}", stacklevel=3)
        if not kept:
            raise UserError(f"{self.source}: no rows left (max_prompt_length={self.limit})")


def _encode_prompt(tokenizer: Any, text: str, chat: bool) -> list[int]:
    tokens = list(tokenizer(text, add_special_tokens=not chat)["input_ids"])
    eos = tokenizer.eos_token_id
    if not chat and len(tokens) > 1 and tokens[-1] == eos:  # some tokenizers close every text
        tokens.pop()
    return tokens


def _start(tokenizer: Any) -> list[int]:
    """What a text without a prompt is conditioned on: the begin-of-sequence token where there is one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _encode_answer(tokenizer: Any, text: str, limit: int) -> list[int]:
    """Tokens of a completion, closed by end-of-sequence unless it was cut at `limit`."""
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if eos is not None and tokens[-1:] != [eos]:
        tokens.append(eos)
    return tokens[:limit]
