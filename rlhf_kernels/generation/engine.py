"""Rollouts inside a fixed budget of KV bytes: packed, padding-free steps over slices of one arena.

Every step is one forward over a flat row of tokens, pieces of new prompts and one token of each running sequence
together; then one fused sampling call draws the next token of every sequence that has logits. `scheduler.py` says who
takes part.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_kernels.generation.arena import Arena, layer_shapes
from rlhf_kernels.generation.forward import Forward, end_tokens, forward_of, most_positions, vocabulary
from rlhf_kernels.generation.rollout import GenerationStats, Rollout
from rlhf_kernels.generation.sampling_params import SamplingParams
from rlhf_kernels.generation.scheduler import Schedule, as_tensor
from rlhf_kernels.integrations.transformers import SlicedRows
from rlhf_kernels.memory_size import parse_bytes
from rlhf_kernels.ops.sampling import sample

STEP_TOKENS = 512  # prompt tokens a step: enough for GEMMs at full speed, few enough not to hold up the decoding rows
DRAW_BYTES = 64 << 20  # of logits gathered at a time when many sequences draw from one prompt's logits


class SlicedGenerator:
    """Generates with the training weights, inside the training process, within `kv_memory` bytes of keys and values.

    Args:
        model: a HydraModel, or a plain transformers causal LM (left as it was, also its mode and attention).
        kv_memory: the arena's bytes: an int, or "512MiB". Allocated at the first generate.
        slice_tokens: tokens in a slice, the unit of leasing and sharing.
        max_active: the most sequences in a step; None: as many as fit into the arena, at most `step_tokens`.
        step_tokens: the most prompt tokens in a step (each decoding sequence adds one token of its own).

    Attributes: `stats`, of the last call (`GenerationStats`).
    Raises ValueError when not even one slice fits into kv_memory, TypeError for a model of another kind.
    """

    def __init__(
        self,
        model: Any,
        kv_memory: int | str,
        slice_tokens: int = 16,
        max_active: int | None = None,
        step_tokens: int = STEP_TOKENS,
    ) -> None:
        if max_active is not None and max_active < 1:
            raise ValueError(f"max_active is {max_active}; it must be at least 1, or None")
        if step_tokens < 1:
            raise ValueError(f"step_tokens is {step_tokens}; it must be at least 1")
        self.model = model
        self.kv_memory = parse_bytes(kv_memory, "kv_memory")
        if isinstance(slice_tokens, bool) or not isinstance(slice_tokens, int) or slice_tokens < 1:
            raise ValueError(f"slice_tokens is {slice_tokens!r}; it must be an int >= 1")
        self.slice_tokens = slice_tokens
        self.step_tokens = step_tokens
        self.max_active = step_tokens if max_active is None else max_active
        self.stats = GenerationStats()
        self._forwards: dict[str, Forward] = {}
        self._busy = False
        self._arena: Arena | None = None
        roles = getattr(model, "roles", None) or {"actor": None}
        self._arena_for(self._forward("actor" if "actor" in roles else next(iter(roles))))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        role: str = "actor",
        streams: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Every prompt's rollouts, ordered by (prompt_index, sample_index).

        prompts: lists of token ids, none empty.  params: for all prompts, or one a prompt.  role: whose adapter runs
        (a HydraModel's).  streams[i]: prompt i's global id, default its index; a draw is a function of the row's logits
        and of (seed, stream, sample_index, position), so equal prompts need different streams to differ, and trainers
        pass ids that are unique over steps and processes.

        Raises KVBudgetError (a ValueError) when a prompt with its max_new_tokens does not fit into the budget even
        alone, naming the bytes it needs; ValueError or TypeError naming the argument for an empty prompt, a token
        outside the vocabulary, prompt + max_new_tokens above the model's max_position_embeddings, lists of the wrong
        length; all before anything is generated. FloatingPointError when the model's logits are NaN.
        """
        rollouts = list(self.stream(prompts, params, role, streams))
        return sorted(rollouts, key=lambda rollout: (rollout.prompt_index, rollout.sample_index))

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        role: str = "actor",
        streams: Sequence[int] | None = None,
    ) -> Iterator[Rollout]:
        """The same rollouts, each as soon as it is finished; nothing runs between two of them, and closing ends it."""
        forward = self._forward(role)
        arena = self._arena_for(forward)
        schedule = Schedule(
            prompts,
            params,
            streams,
            arena,
            vocabulary=vocabulary(forward.lm),
            end_tokens=end_tokens(forward.lm),
            most_positions=most_positions(forward.lm),
            max_active=self.max_active,
            step_tokens=self.step_tokens,
        )
        return self._run(forward, arena, schedule)

    def sleep(self) -> None:
        """Gives the arena's bytes back; the next generate allocates them again."""
        self._check_idle()
        if self._arena is not None:
            self._arena.release()

    def _run(self, forward: Forward, arena: Arena, schedule: Schedule) -> Iterator[Rollout]:
        self._check_idle()
        self._busy = True
        self._take(arena)
        self.stats = GenerationStats()
        try:
            while schedule.core.unfinished:
                start = time.perf_counter()
                finished: list[int] = []
                with torch.no_grad(), forward.prepared():
                    while schedule.core.unfinished and not finished:
                        finished = self._step(forward, arena, schedule)
                rollouts = [schedule.rollout(number) for number in finished]
                self._count(schedule, arena, time.perf_counter() - start)
                yield from rollouts
        finally:
            self._busy = False

    def _step(self, forward: Forward, arena: Arena, schedule: Schedule) -> list[int]:
        """One forward and one draw for all that take part; returns the numbers of the sequences that finished."""
        start = time.perf_counter()
        step, device = schedule.core.plan(), arena.device
        packed = SlicedRows(
            arena,
            as_tensor(step.slots, device),
            as_tensor(step.slice_table, device),
            as_tensor(step.context_lens, device),
            as_tensor(step.cu_q, device),
        )
        input_ids, position_ids = as_tensor(step.input_ids, device), as_tensor(step.position_ids, device)
        rows, sequences = as_tensor(step.logit_rows, device), step.draw_sequences
        arena.copy_slices(step.copies)
        parameters = schedule.draw_parameters(sequences, device)
        parameters["position"] = as_tensor(step.draw_positions, device)
        device_start = time.perf_counter()
        logits = forward.logits(input_ids, position_ids, packed, rows)
        tokens, logprobs = _draw(logits, step.draw_rows, parameters)
        device_end = time.perf_counter()
        if np.isnan(logprobs).any():
            bad = schedule.prompt_index[int(sequences[int(np.isnan(logprobs).argmax())])]
            raise FloatingPointError(f"the model's logits are NaN, first for prompts[{bad}]")
        finished = schedule.core.commit(tokens, logprobs)
        self.stats.host_seconds += time.perf_counter() - device_end + device_start - start
        return finished

    def _count(self, schedule: Schedule, arena: Arena, seconds: float) -> None:
        core, stats = schedule.core, self.stats
        stats.seconds += seconds
        stats.steps = core.steps
        stats.mean_active = core.rows / core.steps
        stats.generated_tokens = core.generated_tokens
        stats.preemptions = core.preemptions
        stats.prefix_tokens_shared = core.prefix_tokens_shared
        stats.prompt_tokens_computed = core.prompt_tokens_computed
        stats.recomputed_tokens = core.recomputed_tokens
        stats.peak_kv_bytes = core.peak_slices * arena.slice_bytes

    def _forward(self, role: str) -> Forward:
        if role not in self._forwards:
            self._forwards[role] = forward_of(self.model, role)
        return self._forwards[role]

    def _arena_for(self, forward: Forward) -> Arena:
        """The arena, made anew when the model's shape, dtype or device is not the one it was made for."""
        lm, arena = forward.lm, self._arena
        wanted = (layer_shapes(lm.config), lm.dtype, lm.device)
        if arena is None or (arena.layers, arena.dtype, arena.device) != wanted:
            self._check_idle()
            layers, dtype, device = wanted
            arena = Arena(layers, self.kv_memory, self.slice_tokens, dtype, device)
            self._take(arena)
        return arena

    def _take(self, arena: Arena) -> None:
        """Makes `arena` the one that holds bytes: a stream may have been opened for a model of another shape since."""
        if self._arena is not None and self._arena is not arena:
            self._arena.release()
        self._arena = arena

    def _check_idle(self) -> None:
        if self._busy:
            raise RuntimeError("this generator is in the middle of a stream; read it to its end or close() it first")


def _draw(logits: torch.Tensor, draw_rows: np.ndarray, parameters: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """One token for each entry of draw_rows (the row of `logits` it is drawn from), and its logprob."""
    if len(draw_rows) == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    if len(draw_rows) == len(logits):
        drawn = [sample(logits, **parameters)]
    else:  # several draw from one prompt's logits
        rows = as_tensor(draw_rows, logits.device)
        piece = max(len(logits), DRAW_BYTES // (logits.shape[-1] * logits.element_size()))
        drawn = []
        for i in range(0, len(rows), piece):
            chosen = {k: v[i : i + piece] if isinstance(v, torch.Tensor) else v for k, v in parameters.items()}
            drawn.append(sample(logits[rows[i : i + piece]], **chosen))
    tokens, logprobs = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*drawn))
    return tokens.cpu().numpy(), logprobs.cpu().numpy()
