"""The Triton tier of the head: E' and the statistics of all columns, the work done in a GEMM's epilogue.

It serves bf16 and fp16 operands of one dtype on a GPU, and any under the interpreter. fp32 operands are left to the
blocks (the library's fp32 GEMM is faster than one on the vector units here), and so are adapters on the head.
"""

import torch

from rlhf_kernels.ops.logprob.head import Head
from rlhf_kernels.ops.logprob.state import Parts, Swept
from rlhf_kernels.ops.logprob.triton_launch import device_of
from rlhf_kernels.ops.logprob.triton_sweeps import Exponentials, Scores
from rlhf_kernels.ops.logprob.triton_tiles import INTERPRETED


def serve(head: Head) -> bool:
    """Whether the kernels take this head."""
    if head.saved is not None or head.rows == 0 or head.x.shape[1] == 0 or head.low_rank:
        return False
    matrices = [m for m in (head.x, head.ref, head.weight, head.ref_weight) if m is not None]
    if any(m.stride(1) != 1 for m in matrices):
        return False
    halves = head.x.dtype in (torch.bfloat16, torch.float16)
    return INTERPRETED or (halves and all(m.dtype == head.x.dtype for m in matrices))


def sweep(head: Head, reference: bool, kl: bool, rkl: bool, states: bool, grad: bool) -> Swept:
    """As `tier.Tier.sweep`. Left to the blocks: a state beside the vector's parts, which they make from one GEMM where
    two kernels here would repeat it; KL together with its reverse, and a reference under both a softcap and a bias,
    whose epilogues would spill."""
    fat = (kl and rkl) or (reference and head.softcap > 0 and head.bias is not None)
    if states and (grad or fat):
        return Swept(None, None)
    with device_of(head.x):
        return _swept(head, reference, kl, rkl, states)


def _swept(head: Head, reference: bool, kl: bool, rkl: bool, states: bool) -> Swept:
    if states:
        scores = Scores(head, reference, kl, rkl)
        found = [scores.run(first) for first in range(0, head.rows, scores.rows_at_once)]
        return Swept(found[0] if len(found) == 1 else torch.cat(found, 1), None)
    parts = [Exponentials(head, first).run() for first in range(0, head.rows, Exponentials.ROWS_AT_ONCE)]
    return Swept(None, parts[0] if len(parts) == 1 else Parts(*(torch.cat(part) for part in zip(*parts))))
