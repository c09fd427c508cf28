"""`lora_linear` where nothing needs a gradient: the CPU's kernels asked at once, and the checks are theirs.

A product of few rows takes as long as its checks in Python. What the kernels refuse, or what is out of the ordinary in
any way, goes the long way round, which says what is wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import tier, tiles
from rlhf_kernels.ops.lora.routing import Routing

TENSORS = (Tensor, torch.nn.Parameter)
LISTS = (list, tuple)
TIER = ("native", tiles)  # as it stands among all


def linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scaling: float | Sequence[float] | Tensor,
    bias: Tensor | None,
    routing: Routing,
) -> Tensor | None:
    """y [rows, N] as `api.lora_linear` gives it; None: not one for the short way."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return None
    if type(x) not in TENSORS or type(weight) not in TENSORS or x.dtype not in tiles.DTYPES:
        return None
    if type(lora_a) not in LISTS or type(lora_b) not in LISTS or type(routing) is not Routing:
        return None
    if isinstance(scaling, bool) or not isinstance(scaling, (float, int)):
        return None
    n, shape, runs = len(lora_a), x.shape, routing.host_runs()
    if runs is None or n != routing.adapters or len(shape) != 2 or shape[0] != routing.rows or shape[0] == 0:
        return None
    if not (x.is_contiguous() and weight.is_contiguous()) or forward_ad._current_level >= 0:
        return None
    if registry.asked() not in (None, TIER[0]) or TIER not in tier.TIERS:
        return None
    y = x.new_empty(shape[0], weight.shape[0])
    biases = [] if bias is None else [bias]
    try:
        torch.ops.rlhf_kernels.lora_tiles.default(
            x, [weight], biases, lora_a, lora_b, None, runs, [float(scaling)] * n, [y], None
        )
    except (RuntimeError, TypeError):
        return None
    return y
