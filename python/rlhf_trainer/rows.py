"""The rows of a JSONL file or a dataset, and their texts: plain, or chats rendered by the tokenizer's template."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError, one_line, shorten
from .hub import unreachable

Row = dict[str, Any]


class Rows:
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
