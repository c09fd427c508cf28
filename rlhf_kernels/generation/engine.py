"""Rollouts inside a fixed budget of KV bytes: packed, padding-free steps over slices of one arena.

Every step is one forward over a flat row of tokens, pieces of new prompts and one token of each running sequence
together; then one fused sampling call draws the next token of every sequence that has logits. `scheduler.py` says who
takes part.
"""

import sys
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_kernels import _engine
from rlhf_kernels.generation.arena import Arena, layer_shapes
from rlhf_kernels.generation.forward import Forward, end_tokens, forward_of, most_positions, vocabulary
from rlhf_kernels.generation.graphs import CaptureError, DecodeGraphs, StaticStep
from rlhf_kernels.generation.rollout import GenerationStats, Rollout
from rlhf_kernels.generation.sampling_params import SamplingParams
from rlhf_kernels.generation.scheduler import Schedule
from rlhf_kernels.generation.step_buffers import StepBuffers, StepSizes
from rlhf_kernels.memory_size import parse_bytes
from rlhf_kernels.ops.sampling.api import sample_known as sample

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
        self._stream: Callable[[], Any] = lambda: None  # the one that is being read
        self._model_seconds = 0.0  # spent in the model and the sampling
        self._graphs = DecodeGraphs()
        self._buffers = StepBuffers(torch.device("cpu"))
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
        rollouts = list(self._open(prompts, params, role, streams, sys.maxsize))
        return sorted(rollouts, key=lambda rollout: (rollout.prompt_index, rollout.sample_index))

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        role: str = "actor",
        streams: Sequence[int] | None = None,
        every: int = 1,
    ) -> Generator[Rollout, None, None]:
        """The same rollouts, each as soon as it is finished; nothing runs between two of them, and closing ends it.

        every: they are handed out when so many have finished. The model is made ready anew each time, which costs a
        walk over its modules: a reader in no hurry asks for more than one.
        """
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        return self._open(prompts, params, role, streams, every)

    def close(self) -> None:
        """Ends the stream that is being read, if there is one; the generator can then be used again."""
        stream = self._stream()
        if stream is not None:
            stream.close()

    def sleep(self) -> None:
        """Gives the bytes of the arena and of the CUDA graphs back; the next generate takes them again."""
        self._check_idle()
        self._graphs.clear()
        if self._arena is not None:
            self._arena.release()

    def _open(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        role: str,
        streams: Sequence[int] | None,
        every: int,
    ) -> Generator[Rollout, None, None]:
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
        opened: list[weakref.ref] = []
        stream = self._run(forward, arena, schedule, every, opened)
        opened.append(weakref.ref(stream))
        return stream

    def _run(
        self, forward: Forward, arena: Arena, schedule: Schedule, every: int, opened: list[weakref.ref]
    ) -> Generator[Rollout, None, None]:
        """Steps until all is done; rollouts as soon as `every` have finished."""
        self._check_idle()
        # No flag to be taken back: a generator that has raised, ended or been dropped is idle by itself.
        self._stream = opened[0]
        self._take(arena)
        self.stats = GenerationStats(seconds=schedule.seconds, host_seconds=schedule.seconds)
        core = schedule.core
        with forward.rollout():
            while core.unfinished:
                start, model_before = time.perf_counter(), self._model_seconds
                finished: list[int] = []
                with torch.no_grad(), forward.prepared():
                    self._graphs.refresh(forward, arena)
                    while core.unfinished and len(finished) < every:
                        finished += self._step(forward, arena, schedule)
                rollouts = [schedule.rollout(number) for number in finished]
                self._count(schedule, arena, time.perf_counter() - start, self._model_seconds - model_before)
                yield from rollouts

    def _step(self, forward: Forward, arena: Arena, schedule: Schedule) -> list[int]:
        """One forward and one draw for all that take part; returns the numbers of the sequences that finished."""
        core = schedule.core
        step = core.plan()
        arena.copy_slices(step.copies)
        static = self._graphs.find(step, schedule, forward, arena, self.max_active)
        if static is not None:
            tokens, logprobs = self._replay(static, forward, arena, step, schedule)
        else:
            tokens, logprobs = self._eager(forward, arena, step, schedule)
        if np.isnan(logprobs).any():
            bad = schedule.prompt_index[int(step.draw_sequences[int(np.isnan(logprobs).argmax())])]
            raise FloatingPointError(f"the model's logits are NaN, first for prompts[{bad}]")
        return core.commit(tokens, logprobs)

    def _eager(
        self, forward: Forward, arena: Arena, step: "_engine.Step", schedule: Schedule
    ) -> tuple[np.ndarray, np.ndarray]:
        inputs = self._buffers.fill(schedule.core, StepSizes(*step.sizes))
        packed, parameters, draw_rows = inputs.packed(arena), inputs.draws(schedule.unused), step.draw_rows
        start = time.perf_counter()
        logits = forward.logits(inputs.input_ids, inputs.position_ids, packed, inputs.logit_rows)
        drawn = _draw(logits, draw_rows, parameters)
        self._model_seconds += time.perf_counter() - start
        return drawn

    def _replay(
        self, static: StaticStep, forward: Forward, arena: Arena, step: "_engine.Step", schedule: Schedule
    ) -> tuple[np.ndarray, np.ndarray]:
        static.fill(schedule.core)
        start = time.perf_counter()
        try:
            drawn = static.replay(step.sizes[1])
        except CaptureError as error:
            self._graphs.give_up(error)
            return self._eager(forward, arena, step, schedule)
        self._model_seconds += time.perf_counter() - start
        self.stats.replayed_steps += 1
        return drawn

    def _count(self, schedule: Schedule, arena: Arena, seconds: float, model_seconds: float) -> None:
        core, stats = schedule.core, self.stats
        stats.seconds += seconds
        stats.host_seconds += seconds - model_seconds
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
        if self._arena is arena:
            return
        if self._arena is not None:
            self._arena.release()
        self._graphs.clear()
        self._buffers = StepBuffers(arena.device)
        self._arena = arena

    def _check_idle(self) -> None:
        stream = self._stream()
        if stream is not None and stream.gi_frame is not None:
            raise RuntimeError(
                "this generator is in the middle of a stream; read it to its end or close() it first (the stream or, "
                "where it is out of reach, this generator)"
            )


def _draw(logits: torch.Tensor, draw_rows: np.ndarray, parameters: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """One token for each entry of draw_rows (the row of `logits` it is drawn from), and its logprob."""
    if len(draw_rows) == 0:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    if len(draw_rows) == len(logits):
        drawn = [sample(logits, **parameters)]
    else:  # several draw from one prompt's logits
        rows = torch.from_numpy(draw_rows).to(logits.device)
        piece = max(len(logits), DRAW_BYTES // (logits.shape[-1] * logits.element_size()))
        drawn = []
        for i in range(0, len(rows), piece):
            chosen = {k: v[i : i + piece] if isinstance(v, torch.Tensor) else v for k, v in parameters.items()}
            drawn.append(sample(logits[rows[i : i + piece]], **chosen))
    tokens, logprobs = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*drawn))
    return tokens.cpu().numpy(), logprobs.cpu().numpy()
