"""Rows to tokens: prompts, preferences and demonstrations from JSONL files or `datasets` names.

A row's prompt is text (`prompt`) or a chat (`messages`, or a list of messages in `prompt`), rendered by the tokenizer's
template. Prompt and completion are tokenised apart, because the policy too continues after the prompt's own tokens.
A prompt longer than `max_prompt_length` is cut on the left, dropped or refused (`prompt_truncation`), with a warning.
"""

import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError, one_line, shorten
from .hub import unreachable

Row = dict[str, Any]


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
    rows = _Rows(source, config)
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
    rows = _Rows(source, config)
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


def load_demonstrations(config: TrainConfig, tokenizer: Any) -> list[Demonstration]:
    """Rows with `prompt` and `completion`, with `text` alone (then the prompt is empty), or with `messages`."""
    source = _source(config, "prompts", "demonstrations")
    assert source is not None
    rows = _Rows(source, config)
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
    named: str | None = getattr(config, which)
    if named is not None:
        return named
    if config.model == "demo":
        from .demo import data_path

        return str(data_path(demo_set))
    if which == "prompts":
        raise UserError("prompts: needed (a JSONL file or a `datasets` name) with any model other than demo")
    return None


class _Rows:
    """The rows of one source with the place each came from ("file.jsonl, line 7"), and how their columns are read."""

    def __init__(self, source: str, config: TrainConfig) -> None:
        self.source, self.column = source, config.prompt_column
        reader = _read_jsonl if Path(source).is_file() else _read_dataset
        self.rows = list(reader(source))
        if not self.rows:
            raise UserError(f"{source}: no rows")
        names: dict[str, None] = {}
        for _, row in self.rows:
            names.update(dict.fromkeys(row))
        self.columns = list(names)

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        for place, row in self.rows:
            yield place, {name: row.get(name) for name in self.columns}

    def is_chat(self, row: Row) -> bool:
        """Whether the prompt is a list of messages; its template then writes the special tokens."""
        value = row.get(self.column)
        return isinstance(value, list) or (value is None and isinstance(row.get("messages"), list))

    def prompt_text(self, place: str, row: Row, tokenizer: Any) -> str:
        value = row.get(self.column)
        if value is None:
            value = row.get("messages")
            if value is None:
                raise self.missing(place, self.column)
        if isinstance(value, list):
            messages = _messages(place, value)
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return _render(place, messages, tokenizer, reply=True)
        return _text(place, self.column, value)

    def answer_text(self, place: str, row: Row, column: str, prompt: str, tokenizer: Any) -> str:
        value = row.get(column)
        if value is None:
            raise self.missing(place, column)
        if not isinstance(value, list):
            text = _text(place, column, value)
        else:
            asked = row.get(self.column)
            before = [] if asked is None else asked
            if not isinstance(before, list):
                raise UserError(f"{place}: {column!r} is a list of messages, so {self.column!r} must be one too")
            text = _after(place, _render(place, _messages(place, before + value), tokenizer, reply=False), prompt)
        if not text.strip():
            raise UserError(f"{place}: {column!r} is empty")
        return text

    def demonstration(self, place: str, row: Row, tokenizer: Any) -> tuple[str, str]:
        if row.get("completion") is not None:
            prompt = self.prompt_text(place, row, tokenizer)
            return prompt, self.answer_text(place, row, "completion", prompt, tokenizer)
        if row.get("messages") is not None:
            messages = _messages(place, row["messages"])
            if not messages or messages[-1]["role"] != "assistant":
                raise UserError(f"{place}: 'messages' must end with the assistant's answer to learn from it")
            prompt = _render(place, messages[:-1], tokenizer, reply=True) if messages[:-1] else ""
            return prompt, _after(place, _render(place, messages, tokenizer, reply=False), prompt)
        if row.get("text") is not None:
            return "", _text(place, "text", row["text"])
        raise self.missing(place, "completion", "('prompt' with 'completion', 'text', or 'messages')")

    def missing(self, place: str, column: str, extra: str = "") -> UserError:
        present = ", ".join(self.columns) or "none"
        hint = f" {extra}" if extra else ""
        return UserError(f"{place}: no column {column!r}{hint}; columns present: {present}")


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


def _read_jsonl(path: str) -> Iterator[tuple[str, Row]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
                if not isinstance(row, dict):
                    raise UserError(f"{place}: expected an object with columns, found {type(row).__name__}")
                yield place, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({one_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _read_dataset(name: str) -> Iterator[tuple[str, Row]]:
    """A directory that `datasets` saved, or NAME[:SPLIT] of a dataset, split "train" unless said."""
    dataset, _, split = name.partition(":")
    if name.endswith((".jsonl", ".json")) or (name.startswith((".", "/", "~")) and not Path(dataset).is_dir()):
        raise UserError(f"prompts: {name!r} does not exist")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"prompts: {name!r} is no file, and `datasets` is not installed to look for it") from error
    host = None if Path(dataset).exists() else unreachable()
    if host:
        datasets.config.HF_HUB_OFFLINE = True  # what its cache holds still loads
    try:
        if Path(dataset).is_dir() and (Path(dataset) / "dataset_info.json").exists():
            table = datasets.load_from_disk(dataset)
        else:
            table = datasets.load_dataset(dataset, split=split or "train")
    except Exception as error:
        why = shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"prompts: {name!r} is neither a file nor a dataset that loads: {why}") from error
    for number, row in enumerate(table):
        yield f"{name}, row {number}", dict(row)


def _text(place: str, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {column!r} must be text or a list of messages, found {type(value).__name__}")
    return value


def _messages(place: str, value: Any) -> list[dict[str, Any]]:
    good = isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    if not good:
        raise UserError(f"{place}: messages must be a list of objects with 'role' and 'content'")
    return list(value)


def _render(place: str, messages: list[dict[str, Any]], tokenizer: Any, reply: bool) -> str:
    if not messages:
        raise UserError(f"{place}: the prompt is empty")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{place}: holds chat messages, but the model's tokenizer has no chat template")
    try:
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    except Exception as error:
        raise UserError(f"{place}: the chat template refuses these messages: {one_line(error)}") from error
    return rendered


def _after(place: str, whole: str, prompt: str) -> str:
    if not whole.startswith(prompt):
        raise UserError(f"{place}: the chat template writes the prompt differently once an answer follows it")
    return whole[len(prompt) :].rstrip("\n")


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
