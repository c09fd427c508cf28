"""Sequences end to end, once for each adapter that must see them: the packed row of one base's forward.

    | adapter 0: sequences, filler | adapter 1: sequences, filler | bypass: sequences, filler |

The filler rounds every part up to a multiple of ROW_ALIGN rows, so that equal rows of two parts sit at the same place
of a GEMM's register tile and get the same bits, whatever the library does at its edges: at step 0 the actor's rows and
the reference's must agree exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_kernels.integrations.transformers import PackedRows
from rlhf_kernels.ops.lora import Routing

ROW_ALIGN = 16


@dataclass
class Batch:
    """Sequences lying end to end. `lengths` and `prompt_lengths` [B] stay on the device they came on."""

    tokens: Tensor  # int64 [tokens]
    lengths: Tensor  # int64 [B]
    prompt_lengths: Tensor  # int64 [B], 1 <= prompt <= length

    def positions(self) -> Tensor:
        """int64 [tokens]: each token's place in its sequence, on lengths' device."""
        starts = self.lengths.cumsum(0) - self.lengths
        every = torch.arange(self.tokens.numel(), device=self.lengths.device)
        return every - starts.repeat_interleave(self.lengths, output_size=self.tokens.numel())

    def completions(self) -> Tensor:
        """int64 flat: where the tokens after each prompt lie. No synchronisation where lengths are on the CPU."""
        prompts = self.prompt_lengths.repeat_interleave(self.lengths, output_size=self.tokens.numel())
        return (self.positions() >= prompts).nonzero().squeeze(1).to(self.tokens.device, non_blocking=True)

    def last(self) -> Tensor:
        """int64 [B]: where each sequence's last token lies."""
        return (self.lengths.cumsum(0) - 1).to(self.tokens.device, non_blocking=True)

    def select(self, sequences: Sequence[int]) -> "Batch":
        """The batch of some of the sequences, in the order given."""
        pieces = self.tokens.split(self.lengths.tolist())
        chosen = torch.tensor(sequences, device=self.lengths.device)
        return Batch(torch.cat([pieces[i] for i in sequences]), self.lengths[chosen], self.prompt_lengths[chosen])


@dataclass
class Part:
    """One adapter's rows of a packed forward: rows [start, start + tokens) of the hidden states."""

    slot: int  # of the adapter; -1 is the bypass
    batch: Batch
    start: int = 0

    def rows(self, hidden: Tensor) -> Tensor:
        return hidden[self.start : self.start + self.batch.tokens.numel()]


@dataclass
class Packed:
    """The inputs of one base's forward."""

    input_ids: Tensor  # int64 [1, rows]
    position_ids: Tensor  # int64 [1, rows]
    rows: PackedRows
    routing: Routing


def pack(parts: Sequence[Part], adapters: int, frozen: bool) -> Packed:
    """Lays the parts one after another (setting their `start`) and routes each to its adapter.

    `frozen`: the base takes no gradient, so bypassed parts, which must come last, need none.
    """
    tokens, positions, lengths, runs = [], [], [], []
    start = with_adapter = 0
    for part in parts:
        batch, device = part.batch, part.batch.tokens.device
        filler = -batch.tokens.numel() % ROW_ALIGN if len(parts) > 1 else 0
        tokens += [batch.tokens, batch.tokens.new_zeros(filler)]
        positions += [batch.positions().to(device, non_blocking=True), batch.tokens.new_zeros(filler)]
        lengths += [batch.lengths] + [batch.lengths.new_tensor([filler])] * bool(filler)
        end = start + batch.tokens.numel() + filler
        runs.append((start, end, part.slot))
        part.start, start = start, end
        with_adapter = end if part.slot >= 0 else with_adapter
    ends = torch.cat(lengths).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32).to(tokens[0].device, non_blocking=True)
    grad_rows = with_adapter if frozen and 0 < with_adapter < start else None
    return Packed(
        torch.cat(tokens).unsqueeze(0),
        torch.cat(positions).unsqueeze(0),
        PackedRows(cu_seqlens),
        Routing.from_runs(runs, adapters, grad_rows),
    )
