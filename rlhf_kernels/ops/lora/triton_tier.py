"""The Triton tier of lora_linear: bf16, fp16 and fp32 on a GPU, and on the CPU in Triton's interpreter.

The index is read on the device in every launch, so overwriting it in place re-routes a replayed graph; the host waits
for nothing, and no shape depends on values. Triton itself is imported at the first call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.logprob.triton_launch import device_of
from rlhf_kernels.ops.lora.library import widths

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

DEVICES = registry.triton_devices()

registry.serves("lora_linear", "triton", DEVICES, DTYPES)


def serves(x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool) -> bool:
    return x.device.type in DEVICES and x.dtype in DTYPES and len(weights) > 0


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    saved_rows: int,
) -> tuple[list[Tensor], Tensor | None]:
    """See `tier.Tier`."""
    from rlhf_kernels.ops.lora import triton_index, triton_steps

    with device_of(x):
        rows = triton_index.rows_of(index, runs, scaling, scaling_tensor, order, x.shape[0], x.device)
        ranks = widths(lora_a, len(weights))
        return triton_steps.forward(x, weights, biases, lora_a, lora_b, ranks, rows, saved_rows)


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    index: Tensor | None,
    runs: Sequence[int] | None,
    scaling: Sequence[float],
    scaling_tensor: Tensor | None,
    order: Tensor | None,
    x: Tensor,
    s: Tensor,
    grad_rows: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See `tier.Tier`."""
    from rlhf_kernels.ops.lora import triton_index, triton_steps

    present = next(grad for grad in grads if grad.ndim == 2)
    with device_of(present):
        total = present.shape[0] if index is not None else grad_rows
        order = None if index is None else order
        rows = triton_index.rows_of(index, runs, scaling, scaling_tensor, order, total, present.device)
        made = triton_steps.Backward(
            grads, weights, lora_a, lora_b, widths(lora_a, len(weights)),
            rows.below(grad_rows), x, s, needs,
        )  # fmt: skip
        return made.run()
