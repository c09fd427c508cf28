"""The definition of `lora_linear`: y[i] = x[i] W^T + bias + scaling[e] (x[i] A_e^T) B_e^T with e = adapter_index[i].

Plain PyTorch, differentiable by autograd, any dtype and device. Each adapter sees its own rows only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    adapter_index: Tensor,
    scaling: Sequence[float] | Tensor,
    grad_rows: int | None = None,
) -> Tensor:
    """x [rows, K], weight [N, K], bias [N]; lora_a[e] [r_e, K], lora_b[e] [N, r_e]; adapter_index int [rows].

    An index outside [-1, n) gives a row of NaN (the checks on top of this raise before that where they may look).
    """
    if grad_rows is not None and grad_rows < x.shape[0]:
        x = torch.cat([x[:grad_rows], x[grad_rows:].detach()])
    y = F.linear(x, weight, bias)
    for e, (a, b) in enumerate(zip(lora_a, lora_b)):
        rows = (adapter_index == e).nonzero().squeeze(1)
        delta = x[rows] @ a.to(x.dtype).T * scaling[e] @ b.to(x.dtype).T
        y = y.index_add(0, rows, delta.to(y.dtype))
    if grad_rows is not None and grad_rows < x.shape[0]:
        y = torch.cat([y[:grad_rows], y[grad_rows:].detach()])
    outside = (adapter_index < -1) | (adapter_index >= len(lora_a))
    return y.masked_fill(outside.unsqueeze(1), float("nan"))
