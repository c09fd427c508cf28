"""Decode steps replayed from CUDA graphs, at a few sizes.

A step in which every row brings one token and draws the next is the same work every time: only the contents of its
buffers differ (tokens, places, slice table, lengths, sampling parameters and random state, all tensors at fixed
addresses). It is captured once for a few numbers of rows; a step of fewer rows is filled up with rows that write to a
scratch slot and whose tokens nobody reads. Without CUDA a replay calls the same function on the same buffers.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlhf_kernels import _engine
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.generation.forward import Forward
from rlhf_kernels.generation.scheduler import Schedule
from rlhf_kernels.generation.step_buffers import DrawBuffers, StepBuffers, StepSizes
from rlhf_kernels.ops.registry import checks_values
from rlhf_kernels.ops.sampling import sample

SWITCH = "RLHF_KERNELS_GRAPHS"  # "0": off; "1": static steps without CUDA, too; unset: on CUDA


class DecodeGraphs:
    """The captured sizes of one generator.

    They are kept for as long as what they read is the same: the arena's buffer, the parameters' storage and version
    (a layer may keep something computed from them), the role; `refresh` drops them otherwise.
    """

    def __init__(self) -> None:
        self._captured: dict[tuple, StaticStep] = {}
        self._key: tuple | None = None
        self._failed = False
        self._pool: Any = None  # one for all sizes: they run one at a time, and nothing of theirs outlives a replay

    def refresh(self, forward: Forward, arena: Arena) -> None:
        """To be called before steps run after anyone else may have touched the model or the arena."""
        key = None
        if self.wanted(arena.device) and forward.fixed:
            key = (id(forward), arena.keys[0].data_ptr(), arena.num_slices, *_state(forward))
        if key != self._key:
            self.clear()
            self._key = key

    def clear(self) -> None:
        """Gives the graphs and their memory back."""
        self._captured.clear()
        self._key = self._pool = None

    def wanted(self, device: torch.device) -> bool:
        """Whether steps on `device` are replayed."""
        asked = os.environ.get(SWITCH, "")
        if asked not in ("", "0", "1"):
            raise ValueError(f"{SWITCH} is {asked!r}; it must be 0 or 1")
        if asked == "0" or self._failed:
            return False
        if device.type == "cuda":  # a check would read values back in the middle of a capture
            return not checks_values(torch.empty(0, device=device))
        return asked == "1"

    def find(
        self, step: "_engine.Step", schedule: Schedule, forward: Forward, arena: Arena, most_rows: int
    ) -> "StaticStep | None":
        """The static step that can run `step`; None: it has prompt pieces in it, or graphs are off."""
        if self._key is None or step.scratch < 0 or not step.one_token_a_row:
            return None
        rows = min(_power_of_two(step.sizes[1]), most_rows)
        width = min(_power_of_two(schedule.most_slices), arena.num_slices)
        size = (rows, width, tuple(schedule.unused))
        if size not in self._captured:
            if self._pool is None and arena.device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            self._captured[size] = StaticStep(forward, arena, rows, width, schedule.unused, self._pool)
        return self._captured[size]

    def give_up(self, error: Exception) -> None:
        """A model or kernel that cannot be captured runs as ever; says so once."""
        self.clear()
        self._failed = True
        warnings.warn(f"decode steps run without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)


class StaticStep:
    """One size: its buffers, what runs on them, and, on CUDA from the second time on, the graph of it."""

    def __init__(
        self, forward: Forward, arena: Arena, rows: int, width: int, unused: dict[str, float], pool: Any
    ) -> None:
        self.sizes = StepSizes(rows, rows, width, rows, rows)
        self.device = arena.device
        self._buffers = StepBuffers(arena.device, _engine.layout(*self.sizes)[-1])
        self._drawn = DrawBuffers(arena.device, rows)
        self._forward, self._arena, self._unused = forward, arena, dict(unused)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pool = pool
        self._uses = 0

    def fill(self, core: "_engine.Scheduler") -> None:
        """Overwrites the buffers with the step that `core` has planned."""
        self._tensors = self._buffers.fill(core, self.sizes)

    def replay(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Runs the step; the tokens and logprobs of its first `rows` rows. Raises CaptureError."""
        if self.device.type != "cuda":
            self._run()
        elif self._uses == 0:  # what is compiled, chosen and allocated once is done before the capture
            _beside(self._run)
        else:
            if self._graph is None:
                self._graph = _capture(self._run, self._pool)
            self._graph.replay()
        self._uses += 1
        return self._drawn.read(rows)

    def _run(self) -> None:
        step = self._tensors
        logits = self._forward.logits(step.input_ids, step.position_ids, step.packed(self._arena), step.logit_rows)
        token, logprob = sample(logits, **step.draws(self._unused))
        self._drawn.tokens.copy_(token)
        self._drawn.logprobs.copy_(logprob)


class CaptureError(RuntimeError):
    """The step cannot be captured: something in it synchronises with the host."""


def _capture(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except RuntimeError as error:
        raise CaptureError(str(error)) from error
    return graph


def _beside(run: Callable[[], None]) -> None:
    """Runs on a stream of its own, as the capture will."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)


def _state(forward: Forward) -> list[tuple[int, int]]:
    """Where every parameter and buffer lies, and how often it has been written."""
    model = getattr(forward, "model", forward.lm)
    tensors = [*model.parameters(), *model.buffers()]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
