"""The CPU's fused tier: bf16 heads on the chip's matrix or vector units (csrc/cpu/head_tiles.cpp)."""

import torch

from rlhf_kernels.ops.logprob import native
from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob.head import Head

SEGMENTS = 4  # of the vocabulary, summed apart


def serve(head: Head) -> bool:
    """Whether the tile kernels take this head whole."""
    plain = not head.low_rank and head.saved is None and head.rows > 0
    weights = [w for w in (head.weight, head.ref_weight) if w is not None]
    return plain and native.has_tiles(head.x) and all(w.stride(1) == 1 for w in weights)


def sweep(head: Head, reference: bool, kl: bool, rkl: bool, states: bool, grad: bool) -> st.Swept:
    """As `tier.Tier.sweep`; policy and reference share their pass over the weight."""
    rows, width = head.x.shape
    state = far = parts = void = total = None
    if states:
        state, far = head.new(SEGMENTS, 10, rows, dtype=torch.float64), head.new(rows, dtype=torch.int32)
    if grad:
        mass, target_z = head.new(rows, dtype=torch.float64), head.new(rows, dtype=torch.float64)
        parts = st.Parts(head.new(rows), mass, target_z, torch.empty(rows, width))
    with_reference = reference and states
    segments = torch.ops.rlhf_kernels.head_tiles(
        head.x, head.ref if with_reference else None, head.weight, head.ref_weight if with_reference else None,
        head.target, None if head.bias is None else head.bias.float().contiguous(), head.temperature, head.softcap,
        head.scale, kl and with_reference, rkl and with_reference, state, far, *(parts or (None,) * 4),
    )  # fmt: skip
    if state is not None and far is not None:
        total = state[0]
        for part in state[1:segments]:
            total = st.merge(total, part, reference)
        void = far.nonzero().squeeze(1) if bool(far.any()) else None
    return st.Swept(total, parts, void)
