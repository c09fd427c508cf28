"""The Triton tier of the head: E' and the statistics of all columns with the work done in a GEMM's epilogue."""

import torch
from torch import Tensor

from rlhf_kernels.ops.logprob.head import Head
from rlhf_kernels.ops.logprob.triton_launch import INTERPRETED
from rlhf_kernels.ops.logprob.triton_sweeps import Exponentials, Scores


class TritonTier:
    """See `tier.Tier`. Serves bf16 and fp16 operands of one dtype on a GPU, and any under the interpreter.

    fp32 operands are left to the blocks: the library's fp32 GEMM is faster than one on the vector units here.
    """

    def exponentials(self, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        if not _served(head):
            return None
        parts = [Exponentials(head, first).run() for first in range(0, head.rows, Exponentials.ROWS_AT_ONCE)]
        shift, mass, target_z, pulled = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts))
        return shift, mass, target_z, pulled

    def states(self, head: Head, reference: bool, kl: bool, rkl: bool) -> Tensor | None:
        if not _served(head) or (kl and rkl):  # both KLs in one epilogue would spill
            return None
        scores = Scores(head, reference, kl, rkl)
        parts = [scores.run(first) for first in range(0, head.rows, scores.rows_at_once)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _served(head: Head) -> bool:
    if head.saved is not None or head.rows == 0 or head.x.shape[1] == 0 or head.low_rank:
        return False
    matrices = [m for m in (head.x, head.ref, head.weight, head.ref_weight) if m is not None]
    if any(m.stride(1) != 1 for m in matrices):
        return False
    halves = head.x.dtype in (torch.bfloat16, torch.float16)
    return INTERPRETED or (halves and all(m.dtype == head.x.dtype for m in matrices))
