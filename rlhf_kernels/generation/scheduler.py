"""One generate call's sequences: checked, numbered for the C++ core, with the sampling parameters of each.

The core (`csrc/engine`) decides what runs in each step: admission, prefix sharing, preemption, refill. A sequence's
number there is its rank, in the order (prompt_index, sample_index); here lie the sequences' parameters, by number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.generation.rollout import Rollout
from rlhf_kernels.generation.sampling_params import SamplingParams

try:
    from rlhf_kernels import _engine
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "rlhf_kernels._engine is not built: run `pip install --no-build-isolation .` (it needs a C++20 compiler)"
    ) from error


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
        self.core = _engine.Scheduler(arena.num_slices, arena.slice_tokens, max_active, step_tokens)
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise TypeError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
        each = _one_per_prompt(params, len(prompts))
        tokens = [_check_prompt(i, prompt, vocabulary) for i, prompt in enumerate(prompts)]
        stream_ids = _check_streams(streams, len(prompts))
        for i, (prompt, p) in enumerate(zip(tokens, each)):
            _check_length(i, len(prompt), p.max_new_tokens, most_positions, arena)
        rules: dict[tuple, int] = {}
        self.prompt_index: list[int] = []
        self.sample_index: list[int] = []
        for i, (prompt, p) in enumerate(zip(tokens, each)):
            key = (p.ignore_eos, p.stop_token_ids)
            if key not in rules:
                rules[key] = self.core.add_rule([] if p.ignore_eos else list(end_tokens), list(p.stop_token_ids))
            for sample in range(p.rollouts):
                self.core.add(prompt, p.max_new_tokens, rules[key])
                self.prompt_index.append(i)
                self.sample_index.append(sample)
        self.greedy = [each[i].temperature == 0 or s == each[i].n for i, s in zip(self.prompt_index, self.sample_index)]
        # a column with one value throughout stays a number, and costs nothing a step
        self._columns = {
            name: _column([getattr(each[i], name) for i in self.prompt_index], dtype)
            for name, dtype in (
                ("temperature", np.float32),
                ("top_k", np.int64),
                ("top_p", np.float64),
                ("min_p", np.float64),
                ("seed", np.int64),
            )
        }
        self._columns["stream"] = _column([stream_ids[i] for i in self.prompt_index], np.int64)
        self._columns["sample_index"] = _column(self.sample_index, np.int64)
        self._columns["greedy"] = _column(self.greedy, np.bool_)

    def draw_parameters(self, sequences: np.ndarray, device: torch.device) -> dict[str, Any]:
        """`sample`'s keywords for the next tokens of `sequences`, int64 [draws]."""
        return {
            name: torch.from_numpy(column[sequences]).to(device) if isinstance(column, np.ndarray) else column
            for name, column in self._columns.items()
        }

    def rollout(self, number: int) -> Rollout:
        """What a finished sequence generated."""
        tokens, logprobs, reason = self.core.outcome(number)
        return Rollout(
            self.prompt_index[number], self.sample_index[number], tokens, logprobs, reason, self.greedy[number]
        )


def as_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    """A step's array on the model's device."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def _column(values: list, dtype: type) -> Any:
    if all(value == values[0] for value in values):
        return values[0] if values else 0
    return np.array(values, dtype=dtype)


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
