"""What says that a completion is good: Python functions, sequence classifiers, or a weighted sum of several.

A reward is called as `f(prompts, completions, **columns) -> list[float]`, `columns` being the prompts' other columns.
Whatever does not come back as one finite number a completion stops the run with the prompt that did it.
"""

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError, shorten

Columns = dict[str, list[Any]]
RewardFunction = Callable[..., Sequence[float]]


class RewardError(UserError):
    """A reward that cannot be loaded, raised, or gave something other than one finite number a completion."""


class RewardSum:
    """`sum_i weight_i * reward_i(prompts, completions, **columns)`; `last`: each reward's mean over the last call."""

    def __init__(self, rewards: dict[str, RewardFunction], weights: Sequence[float]) -> None:
        self.rewards, self.weights = rewards, list(weights)
        self.last: dict[str, float] = {}

    def __call__(self, prompts: list[str], completions: list[str], columns: Columns | None = None) -> list[float]:
        """Scores of `completions` (same order); RewardError names the reward, the prompt and what came back."""
        total = [0.0] * len(prompts)
        if not prompts:
            return total
        for (name, function), weight in zip(self.rewards.items(), self.weights):
            scores = call_reward(name, function, prompts, completions, columns or {})
            self.last[name] = sum(scores) / len(scores)
            total = [t + weight * s for t, s in zip(total, scores)]
        return total


def build_rewards(config: TrainConfig) -> RewardSum | None:
    """The rewards that `config.reward` names; None when it names none: the model's reward head is the reward."""
    if not config.reward:
        return None
    duplicates = {r for r in config.reward if config.reward.count(r) > 1}
    if duplicates:
        raise RewardError(f"reward: {sorted(duplicates)[0]!r} is given twice; use reward_weights")
    rewards = {name: load_reward(name, config) for name in config.reward}
    return RewardSum(rewards, config.reward_weights or [1.0] * len(rewards))


def load_reward(name: str, config: TrainConfig) -> RewardFunction:
    """`pkg.mod:function`, or a sequence classifier's directory or hub id."""
    if not Path(name).exists() and ":" in name:
        return load_function(name)
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise RewardError(
            f"reward: {name!r} does not exist (a directory of a sequence classifier, or pkg.mod:function)"
        )
    if not Path(name).is_dir() and "/" not in name:
        raise RewardError(f"reward: {name!r} is neither pkg.mod:function nor the directory of a sequence classifier")
    return ClassifierReward(name, config)


def load_function(name: str) -> RewardFunction:
    """The function `pkg.mod:function`; modules are looked for in the current directory too."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.invalidate_caches()
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise RewardError(
                f"reward {name!r}: no module named {error.name!r} in the current directory or the installed packages"
            ) from error
        raise RewardError(f"reward {name!r}: importing it failed: {error}") from error
    except Exception as error:
        raise RewardError(f"reward {name!r}: importing it raised {shorten(repr(error), 200)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RewardError(f"reward {name!r}: module {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise RewardError(f"reward {name!r}: is {type(found).__name__}, not a function")
    return _with_accepted_columns(found)


def _with_accepted_columns(function: RewardFunction) -> RewardFunction:
    """A function without `**columns` receives only the columns it names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin that does not say
        return function
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return function
    accepted = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}

    def narrowed(prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]:
        return function(prompts, completions, **{k: v for k, v in columns.items() if k in accepted})

    return narrowed


def call_reward(
    name: str, function: RewardFunction, prompts: list[str], completions: list[str], columns: Columns
) -> list[float]:
    """One checked call: as many finite floats as completions, or RewardError with the prompt that did it."""
    extra = {k: v for k, v in columns.items() if k not in ("prompts", "completions")}
    try:
        scores = function(prompts, completions, **extra)
    except Exception as error:
        culprit, reason = _culprit(function, prompts, completions, extra, error)
        raise RewardError(
            f"reward {name!r} raised {type(reason).__name__}({shorten(str(reason), 120)}) on prompt {shorten(culprit)}"
        ) from reason
    if hasattr(scores, "tolist"):  # a tensor or an array
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        raise RewardError(
            f"reward {name!r} returned {type(scores).__name__}, not a list of {len(prompts)} numbers, "
            f"on the batch that begins with prompt {shorten(prompts[0])}"
        )
    if len(scores) != len(prompts):
        raise RewardError(
            f"reward {name!r} returned {len(scores)} numbers for {len(prompts)} completions, "
            f"on the batch that begins with prompt {shorten(prompts[0])}"
        )
    return [_number(name, s, p, c) for s, p, c in zip(scores, prompts, completions)]


def _number(name: str, score: Any, prompt: str, completion: str) -> float:
    if hasattr(score, "item"):
        score = score.item()
    if isinstance(score, Real) and math.isfinite(score):
        return float(score)
    raise RewardError(
        f"reward {name!r} returned {shorten(repr(score), 60)}, not a finite number, "
        f"on prompt {shorten(prompt)} with completion {shorten(completion)}"
    )


def _culprit(
    function: RewardFunction, prompts: list[str], completions: list[str], columns: Columns, error: Exception
) -> tuple[str, Exception]:
    """The first prompt found, by halving, on which the function raises alone, and what it raises there."""
    rows = list(range(len(prompts)))
    while len(rows) > 1:
        half = rows[: len(rows) // 2]
        part = {k: [v[i] for i in half] for k, v in columns.items()}
        try:
            function([prompts[i] for i in half], [completions[i] for i in half], **part)
            rows = rows[len(rows) // 2 :]
        except Exception as caught:
            rows, error = half, caught
    return prompts[rows[0]], error


class ClassifierReward:
    """The score of an `AutoModelForSequenceClassification` with one label, on prompt + completion.

    Texts are scored in batches of like length, without gradients; one that is too long loses its beginning.
    """

    def __init__(self, path: str, config: TrainConfig) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right", truncation_side="left")
            self.model = AutoModelForSequenceClassification.from_pretrained(
                path, use_safetensors=True, dtype=getattr(torch, config.dtype)
            )
        except Exception as error:
            raise RewardError(
                f"reward {path!r}: is no sequence classifier that loads: {shorten(str(error), 200)}"
            ) from error
        labels = self.model.config.num_labels
        if labels != 1:
            raise RewardError(f"reward {path!r}: has {labels} labels; a reward is one number (num_labels=1)")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.get_text_config().pad_token_id is None:  # where decoders look for a row's last token
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.to(config.device).eval().requires_grad_(False)
        self.batch = config.micro_batch
        self.limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        """[B] scores, one a completion."""
        import torch

        texts = [p + c for p, c in zip(prompts, completions)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=self.limit is not None,
                max_length=self.limit,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.no_grad():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            for i, score in zip(rows, logits[:, 0].float().tolist()):
                scores[i] = score
        return scores
