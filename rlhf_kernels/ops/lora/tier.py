"""Which module computes lora_linear for a device, dtype and shape: the one place where that choice is made.

A tier is a module with `serves`, `forward` and `backward`; all keep S in the same layout, so that one tier's backward
may follow another's forward. To add one: import it below and give it its line in TIERS.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora import library, small, tiles, triton_tier


class Tier(Protocol):
    """The two functions of a backend, and what it serves.

    x [rows, K]; weights P x [N_p, K]; biases P tensors or None; lora_a, lora_b: P * n tensors, entry p * n + e,
    [r, K] and [N_p, r]; index int [rows] or None; runs start, end, adapter, ... or None: where both are there they say
    the same; where runs is None, index is scattered (checked already) or on a device the host may not read.
    scaling: n floats, scaling_tensor float32 [n] (never on the CPU) goes before it. order: see Routing.
    s [saved_rows, sum of R_p], R_p the largest rank of projection p: row i holds scaling[e] x_i A_{p,e}^T in the first
    rank(p, e) of p's columns, zeros elsewhere.
    """

    def serves(self, x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool) -> bool:
        """Whether it takes inputs like these."""

    def forward(
        self,
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
        """y [rows, N_p] of every projection, and s; None stands for an s of no rows."""

    def backward(
        self,
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
        """[dx, *dweights, *dbiases, *dA, *dB]; an empty tensor where `needs`, in that order, is False.

        grads: P tensors [rows, N_p], or empty ones for an output nobody used; rows from grad_rows on are not read and
        get zeros in dx. runs lie below grad_rows. s has grad_rows rows where a dB is needed. Where dx is not needed
        `weights`, where neither a dA nor a dweight is needed `x`, may be stand-ins of the right shape.
        """


TIERS: tuple[tuple[registry.Backend, Tier], ...] = (  # in order of preference
    ("native", small),
    ("native", tiles),
    ("triton", triton_tier),
    ("native", library),
)


def chosen(x: Tensor, weights: Sequence[Tensor], lora_a: Sequence[Tensor], backward: bool = False) -> Tier | None:
    """The tier for these inputs; None: the definition, naive."""
    asked = registry.asked()
    for backend, tier in TIERS:
        if asked in (None, backend) and tier.serves(x, weights, lora_a, backward):
            return tier
    return None
