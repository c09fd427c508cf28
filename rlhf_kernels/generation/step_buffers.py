"""A step's arrays in one buffer: the core writes them into host memory, and one copy takes them to the device.

The buffer is made once and grows when a step needs more. On a CUDA device the host's side is pinned and the copy is
asynchronous; on the CPU there is one side only. Views of it are made anew only when a step has other sizes than the
last one, and are overwritten by the next step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_kernels import _engine
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.integrations.transformers import SlicedRows

FIRST_BYTES = 1 << 16


class StepSizes(NamedTuple):
    """How much a step brings: tokens, rows (sequences), slices a row of the table, rows of logits, draws."""

    tokens: int
    rows: int
    width: int
    logits: int
    draws: int


@dataclass(slots=True)
class StepTensors:
    """A step on the device, in the order in which csrc/engine/step.h lays it out."""

    input_ids: Tensor  # int64 [tokens]
    position_ids: Tensor  # int64 [tokens]
    slots: Tensor  # int64 [tokens]
    logit_rows: Tensor  # int64 [logits]: the tokens whose logits are wanted
    draw_rows: Tensor  # int64 [draws]: which of those each draw is made from
    position: Tensor  # int64 [draws]; from here to min_p: `sample`'s parameters
    top_k: Tensor  # int64 [draws]
    seed: Tensor  # int64 [draws]
    stream: Tensor  # int64 [draws]
    sample_index: Tensor  # int64 [draws]
    temperature: Tensor  # fp64 [draws]
    top_p: Tensor  # fp64 [draws]
    min_p: Tensor  # fp64 [draws]
    cu_q: Tensor  # int32 [rows + 1]
    context_lens: Tensor  # int32 [rows]
    slice_table: Tensor  # int32 [rows, width]
    greedy: Tensor  # bool [draws]

    def packed(self, arena: Arena) -> SlicedRows:
        """What attention reads of it."""
        return SlicedRows(arena, self.slots, self.slice_table, self.context_lens, self.cu_q)

    def draws(self, unused: dict[str, float]) -> dict[str, Any]:
        """`sample`'s keywords; a filter that no sequence of the call uses (`unused`) stays a number."""
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stream", "sample_index", "position", "greedy")
        return {name: getattr(self, name) for name in names} | unused


class StepBuffers:
    """Where the steps of one generator (or of one captured size) lie. `bytes`: room to begin with."""

    def __init__(self, device: torch.device, nbytes: int = FIRST_BYTES) -> None:
        self.device = device
        self._sizes: StepSizes | None = None
        self._sent: torch.cuda.Event | None = None
        self._make(nbytes)

    def fill(self, core: "_engine.Scheduler", sizes: StepSizes) -> StepTensors:
        """The step that `core` has planned, as tensors of `sizes`; valid until the next call.

        sizes: the step's own or, where every row is one token, more rows (the rows added are never read).
        """
        if sizes != self._sizes:
            starts = _engine.layout(*sizes)
            if starts[-1] > self._host.numel():
                self._make(2 * starts[-1])
            self._tensors, self._used = self._views(starts, sizes), starts[-1]
            self._sizes = sizes
        if self._sent is not None:
            self._sent.synchronize()  # the last copy has read what is overwritten now
        core.pack(self._array, *sizes)
        if self._sent is not None:
            self._bytes[: self._used].copy_(self._host[: self._used], non_blocking=True)
            self._sent.record()
        return self._tensors

    def _make(self, nbytes: int) -> None:
        self._sizes = None
        cuda = self.device.type == "cuda"
        with torch.inference_mode(False):
            self._host = host = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=cuda)
            self._bytes = host if self.device.type == "cpu" else torch.zeros_like(host, device=self.device)
            self._typed = {t: self._bytes.view(t) for t in (torch.int64, torch.float64, torch.int32, torch.bool)}
        self._array = host.numpy()
        self._sent = torch.cuda.Event() if cuda else None

    def _views(self, starts: list[int], sizes: StepSizes) -> StepTensors:
        lengths = (
            *[(torch.int64, n) for n in (sizes.tokens,) * 3 + (sizes.logits,) + (sizes.draws,) * 6],
            *[(torch.float64, sizes.draws)] * 3,
            *[(torch.int32, n) for n in (sizes.rows + 1, sizes.rows, sizes.rows * sizes.width)],
            (torch.bool, sizes.draws),
        )
        flat = [
            self._typed[dtype].narrow(0, start // dtype.itemsize, length)
            for start, (dtype, length) in zip(starts, lengths)
        ]
        flat[15] = flat[15].view(sizes.rows, sizes.width)
        return StepTensors(*flat)


class DrawBuffers:
    """The tokens and logprobs of up to `draws` draws, side by side, so that one copy brings them to the host."""

    def __init__(self, device: torch.device, draws: int) -> None:
        with torch.inference_mode(False):
            self._device = torch.zeros(12 * draws, dtype=torch.uint8, device=device)
            self._host = (
                torch.zeros_like(self._device, device="cpu", pin_memory=True) if device.type == "cuda" else self._device
            )
            self.tokens = self._device[: 8 * draws].view(torch.int64)
            self.logprobs = self._device[8 * draws :].view(torch.float32)
        array = self._host.numpy()
        self._read = array[: 8 * draws].view(np.int64), array[8 * draws :].view(np.float32)

    def read(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `draws` of them, once the device has made them; valid until they are drawn anew."""
        if self._host is not self._device:
            self._host.copy_(self._device)
        tokens, logprobs = self._read
        return tokens[:draws], logprobs[:draws]
