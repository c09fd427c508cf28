"""What the log-probability ops return, and the names of their fields."""

from typing import NamedTuple

from torch import Tensor

DIVERGENCES = ("kl", "rkl", "js", "k1", "k2", "k3")
SAMPLED = ("k1", "k2", "k3")  # functions of logprob and ref_logprob alone
FIELDS = ("logprob", "lse", "entropy", "ref_logprob", *DIVERGENCES)


class LinearLogprobOutput(NamedTuple):
    """Per-token fields of `linear_logprob`, fp32 in the target's shape; None where not asked for."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    ref_logprob: Tensor | None = None
    kl: Tensor | None = None
    rkl: Tensor | None = None
    js: Tensor | None = None
    k1: Tensor | None = None
    k2: Tensor | None = None
    k3: Tensor | None = None


class LogprobOutput(NamedTuple):
    """Per-token fields of `logprob`, fp32 in the target's shape; entropy None unless asked for."""

    logprob: Tensor
    lse: Tensor
    entropy: Tensor | None = None


def sampled_estimator(name: str, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """k1 = log p - log q, k2 = k1^2 / 2, k3 = e^-k1 - 1 + k1 at the sampled token (Schulman, "Approximating KL")."""
    k1 = logprob - ref_logprob
    if name == "k1":
        return k1
    if name == "k2":
        return k1 * k1 / 2
    wide = k1.double()  # expm1(-k1) + k1 cancels near 0
    return (wide.neg().expm1() + wide).to(k1.dtype)
