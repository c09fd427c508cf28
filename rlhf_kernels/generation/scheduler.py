"""One generate call's sequences: checked, numbered for the C++ core, with the sampling parameters of each.

The core (`csrc/engine`) decides what runs in each step: admission, prefix sharing, preemption, refill. A sequence's
number there is its rank, in the order (prompt_index, sample_index). All that is done here is done once a call: a step
costs the host what its own rows cost, however many sequences wait or have finished.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.generation.rollout import Rollout
from rlhf_kernels.generation.sampling_params import SamplingParams

try:
    from rlhf_kernels import _engine
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "rlhf_kernels._engine is not built: run `pip install --no-build-isolation .` (it needs a C++20 compiler)"
    ) from error

DRAW_FIELDS: dict[str, type] = {
    "temperature": np.float64,
    "top_k": np.int64,
    "top_p": np.float64,
    "min_p": np.float64,
    "seed": np.int64,
}
FILTERS: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and the value that lets everything through


class KVBudgetError(ValueError):
    """A prompt with its max_new_tokens does not fit into the KV budget even alone."""


class Schedule:
    """The sequences of one generate call over `arena`'s slices.

    Raises what `SlicedGenerator.generate` documents, before anything is generated.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        streams: Sequence[int] | None,
        arena: Arena,
        *,
        vocabulary: int,
        end_tokens: Sequence[int],
        most_positions: int | None,
        max_active: int,
        step_tokens: int,
    ) -> None:
        start = time.perf_counter()
        self.core = _engine.Scheduler(arena.num_slices, arena.slice_tokens, max_active, step_tokens)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
        each = _one_per_prompt(params, len(prompts))
        tokens = [_check_prompt(i, prompt, vocabulary) for i, prompt in enumerate(prompts)]
        stream_ids = _check_streams(streams, len(prompts))
        for i, (prompt, p) in enumerate(zip(tokens, each)):
            _check_length(i, len(prompt), p.max_new_tokens, most_positions, arena)
        rules: dict[tuple, int] = {}
        for prompt, p in zip(tokens, each):
            key = (p.ignore_eos, p.stop_token_ids)
            if key not in rules:
                rules[key] = self.core.add_rule([] if p.ignore_eos else list(end_tokens), list(p.stop_token_ids))
            self.core.add(prompt, p.max_new_tokens, rules[key], p.rollouts)
        self._set_draws(each, stream_ids)
        longest = max((len(prompt) + p.max_new_tokens - 1 for prompt, p in zip(tokens, each)), default=0)
        self.most_slices = -(-longest // arena.slice_tokens)  # of one sequence
        self.seconds = time.perf_counter() - start  # what all this took

    def _set_draws(self, each: list[SamplingParams], streams: list[int]) -> None:
        """Gives the core every sequence's sampling parameters, as columns."""
        count = len(each)
        rollouts = np.fromiter((p.rollouts for p in each), np.int64, count)
        self.prompt_index = np.repeat(np.arange(count), rollouts)
        first = rollouts.cumsum() - rollouts
        self.sample_index = np.arange(len(self.prompt_index)) - first[self.prompt_index]
        column: dict[str, np.ndarray] = {
            name: np.fromiter((getattr(p, name) for p in each), dtype, count) for name, dtype in DRAW_FIELDS.items()
        }
        apart = self.sample_index == np.fromiter((p.n for p in each), np.int64, count)[self.prompt_index]
        self.greedy = (column["temperature"] == 0)[self.prompt_index] | apart
        # a filter that no one uses stays a number
        self.unused = {name: off for name, off in FILTERS.items() if (column[name] == off).all()}
        column["stream"] = np.array(streams, np.int64)
        self.core.set_draws(
            **{name: values[self.prompt_index] for name, values in column.items()},
            sample_index=self.sample_index,
            greedy=self.greedy,
        )

    def rollout(self, number: int) -> Rollout:
        """What a finished sequence generated; it is forgotten here."""
        tokens, logprobs, reason = self.core.take(number)
        prompt, sample = int(self.prompt_index[number]), int(self.sample_index[number])
        return Rollout(prompt, sample, tokens, logprobs, reason, bool(self.greedy[number]))


def _one_per_prompt(params: Any, count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    each = list(params) if isinstance(params, Sequence) else None
    if each is None or not all(isinstance(p, SamplingParams) for p in each):
        raise TypeError("params must be a SamplingParams, or a list of them, one a prompt")
    if len(each) != count:
        raise ValueError(f"params has {len(each)} entries for {count} prompts; it needs one a prompt")
    return each


def _check_prompt(index: int, prompt: Any, vocabulary: int) -> np.ndarray:
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # ragged
        tokens = np.empty((0, 0))
    if tokens.size == 0 and tokens.ndim == 1:
        raise ValueError(f"prompts[{index}] is empty; a prompt needs at least one token")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TypeError(f"prompts[{index}] must be a flat list of token ids (ints)")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(f"prompts[{index}] holds token {bad}; the model's vocabulary is 0 to {vocabulary - 1}")
    return tokens.astype(np.int32)


def _check_streams(streams: Sequence[int] | None, count: int) -> list[int]:
    if streams is None:
        return list(range(count))
    ids = list(streams)
    if len(ids) != count:
        raise ValueError(f"streams has {len(ids)} entries for {count} prompts; it needs one a prompt")
    for i, stream in enumerate(ids):
        if not isinstance(stream, (int, np.integer)) or isinstance(stream, bool):
            raise TypeError(f"streams[{i}] is {stream!r}; it must be an int")
        if not -(2**63) <= stream < 2**63:
            raise ValueError(f"streams[{i}] is {stream}; it must fit in 64 bits")
    return [int(stream) for stream in ids]


def _check_length(index: int, prompt: int, new: int, most_positions: int | None, arena: Arena) -> None:
    if most_positions is not None and prompt + new > most_positions:
        raise ValueError(
            f"prompts[{index}] has {prompt} tokens; with max_new_tokens={new} that is {prompt + new}, above the "
            f"model's max_position_embeddings of {most_positions}"
        )
    kept = prompt + new - 1  # the last token is never read again
    slices = -(-kept // arena.slice_tokens)
    if slices > arena.num_slices:
        raise KVBudgetError(
            f"prompts[{index}] has {prompt} tokens; with max_new_tokens={new} its keys and values need "
            f"{slices * arena.slice_bytes} bytes, and kv_memory is {arena.kv_memory}"
        )
