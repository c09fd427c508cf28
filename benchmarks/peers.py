"""The ways others get log-probabilities from hidden states, each behind the same three signatures.

A head is loaded by name for a device and raises `Unavailable` where its library is missing, where its kernels need a
GPU, or where it does not do the work asked for. hidden [N, H] and weight [V, H] have one dtype, target is int64 [N];
log-probabilities are [N], differentiable in hidden (and weight where that requires a gradient).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import OURS, Unavailable
from rlhf_kernels import linear_logprob

PerToken = Callable[[Tensor, Tensor, Tensor], Tensor]
Pair = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

TRL_CHUNK = 32768  # vocabulary columns a chunk, as TRL 1.16's trainers set it
EAGER_ROWS = 64  # rows at a time of the frugal eager version


@dataclass(frozen=True)
class Head:
    """One way of doing the work; None where it does not.

    `entropy` gives (logprob, entropy), `divergence(hidden, ref_hidden, weight, target)` KL(policy || reference) too.
    `summed`: the loss comes back as one sum, so per-token upstream gradients are not possible.
    `frozen_only`: no gradient for the weight. `scoring_only`: a way to save memory that a backward pass would undo.
    """

    logprob: PerToken
    entropy: Pair | None = None
    divergence: Divergence | None = None
    summed: bool = False
    frozen_only: bool = False
    scoring_only: bool = False


def attribute(module: str, name: str) -> Any:
    """`module.name`; Unavailable where the library is not installed or does not import here."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing, wanted = error.name or module, module.split(".")[0]
        raise Unavailable("not installed" if missing == wanted else f"not installed: needs {missing}") from error
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Unavailable(f"does not import: {str(error).splitlines()[0]}") from error


def ours(device: str) -> Head:
    def divergence(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = linear_logprob(hidden, weight, target, entropy=True, ref_hidden=ref_hidden, divergence=("kl",))
        assert out.entropy is not None
        assert out.kl is not None
        return out.logprob, out.entropy, out.kl

    def entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logprob(hidden, weight, target, entropy=True)
        assert out.entropy is not None
        return out.logprob, out.entropy

    return Head(lambda h, w, y: linear_logprob(h, w, y).logprob, entropy, divergence)


def eager(device: str) -> Head:
    """GEMM in the inputs' dtype, log-softmax in fp32."""
    return _eager(lambda hidden, weight: (hidden @ weight.t()).float())


def eager_fp32(device: str) -> Head:
    """The inputs widened to fp32 before the GEMM."""
    return _eager(lambda hidden, weight: hidden.float() @ weight.float().t())


def _eager(logits: Callable[[Tensor, Tensor], Tensor]) -> Head:
    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return logits(hidden, weight).log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)

    def entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        lp = logits(hidden, weight).log_softmax(-1)
        return lp.gather(-1, target[:, None]).squeeze(-1), -(lp.exp() * lp).sum(-1)

    def divergence(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lp = logits(hidden, weight).log_softmax(-1)
        lq = logits(ref_hidden, weight).log_softmax(-1)
        p = lp.exp()
        return lp.gather(-1, target[:, None]).squeeze(-1), -(p * lp).sum(-1), (p * (lp - lq)).sum(-1)

    return Head(logprob, entropy, divergence)


def eager_by_rows(device: str) -> Head:
    """Eager, a few rows at a time."""
    whole = eager(device)
    assert whole.divergence is not None
    of_chunk = whole.divergence

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        chunks = zip(hidden.split(EAGER_ROWS), target.split(EAGER_ROWS))
        return torch.cat([whole.logprob(h, weight, y) for h, y in chunks])

    def divergence(hidden: Tensor, ref_hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chunks = zip(hidden.split(EAGER_ROWS), ref_hidden.split(EAGER_ROWS), target.split(EAGER_ROWS))
        parts = [of_chunk(h, r, weight, y) for h, r, y in chunks]
        logprobs, entropies, kls = zip(*parts)
        return torch.cat(logprobs), torch.cat(entropies), torch.cat(kls)

    return Head(logprob, divergence=divergence, scoring_only=True)


def trl_chunked(device: str) -> Head:
    """TRL's own chunk size; only the outputs asked for, which TRL computes on request."""
    function = attribute("trl.kernels", "ChunkedLogProbFunction")

    def logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    def entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return function.apply(hidden, weight, None, target, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))[:2]

    return Head(logprob, entropy)


def trl_selective(device: str) -> Head:
    """TRL's `selective_log_softmax` on whole logits in the inputs' dtype."""
    function = attribute("trl.trainer.utils", "selective_log_softmax")
    with_entropy = attribute("trl.trainer.utils", "selective_log_softmax_and_entropy")
    return Head(lambda h, w, y: function(h @ w.t(), y), lambda h, w, y: with_entropy(h @ w.t(), y))


def liger_scaled(device: str) -> Head:
    """Liger's per-token fused scaled cross entropy; off Hopper GPUs it runs its PyTorch fallback."""
    function = attribute(
        "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
    )
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        try:
            importlib.import_module("cutlass")  # what compiles the Hopper kernel
        except ImportError as error:
            raise Unavailable("not installed: needs liger-kernel[cutedsl]") from error

    def entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, found = function.apply(hidden, weight, target, return_entropy=True)
        return -nll, found

    return Head(lambda h, w, y: -function.apply(h, w, y), entropy)


def liger_chunked(device: str) -> Head:
    """The log-probabilities of Liger's chunked PPO and GRPO losses: PyTorch operations, vocabulary chunks of 4,096."""
    base = attribute("liger_kernel.chunked_loss.fused_linear_ppo", "LigerFusedLinearPPOBase")
    return Head(lambda h, w, y: base.chunk_forward(h[None], w, y[None]).squeeze(0))


def liger_cross_entropy(device: str) -> Head:
    """Liger's fused linear cross entropy: Triton, and gradients computed in the forward for a scalar loss."""
    function = attribute("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    _needs_gpu(device)
    return Head(lambda h, w, y: -function(h, w, y, reduction="sum"), summed=True)


def cce(device: str) -> Head:
    function = attribute("cut_cross_entropy", "linear_cross_entropy")
    _needs_gpu(device)
    return Head(lambda h, w, y: -function(h, w, y, reduction="none"))


def cce_compiled(device: str) -> Head:
    """Cut Cross Entropy's torch.compile implementation."""
    function = attribute("cut_cross_entropy", "linear_cross_entropy")
    return Head(lambda h, w, y: -function(h, w, y, reduction="none", impl="torch_compile"))


def _needs_gpu(device: str) -> None:
    if device != "cuda":
        raise Unavailable("needs a GPU")


class _TwoGemms(torch.autograd.Function):
    """The frozen head's two GEMMs by PyTorch operations, a block of the vocabulary at a time.

    Shifted by the target's logit, the sums need no running maximum: S = sum e^(z - z_y) without the target,
    logprob = -log1p(S), and its gradient (W_y S - sum e^(z - z_y) W) / (1 + S) is ready with the forward. No guard for
    logits far above the target's, which e^(z - z_y) would overflow: a yardstick of speed, not a kernel to use.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, block: int) -> Tensor:
        wants = ctx.needs_input_grad[0]
        at_target = weight[target]
        z_y = (hidden.float() * at_target.float()).sum(-1, keepdim=True)
        mass = hidden.new_zeros(len(hidden), dtype=torch.float32)
        pulled = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wants else None
        rows = torch.arange(len(hidden), device=hidden.device)
        for start in range(0, len(weight), block):
            part = weight[start : start + block]
            e = (hidden @ part.t()).float().sub_(z_y).exp_()
            local = target - start
            inside = (local >= 0) & (local < len(part))
            e[rows[inside], local[inside]] = 0
            mass += e.sum(-1)
            if pulled is not None:
                pulled += e.to(weight.dtype) @ part
        if pulled is not None:
            gradient = (at_target.float() * mass[:, None] - pulled) / (1 + mass)[:, None]
            ctx.save_for_backward(gradient.to(hidden.dtype))
        return -torch.log1p(mass)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient.dtype), None, None, None


def two_gemms(device: str) -> Head:
    return Head(lambda h, w, y: _TwoGemms.apply(h, w, y, 8192), frozen_only=True)


HEADS: dict[str, Callable[[str], Head]] = {
    OURS: ours,
    "eager": eager,
    f"eager, {EAGER_ROWS} rows at a time": eager_by_rows,
    "two GEMMs in PyTorch": two_gemms,
    "TRL chunked": trl_chunked,
    "TRL selective_log_softmax": trl_selective,
    "Liger scaled CE": liger_scaled,
    "Liger chunked loss": liger_chunked,
    "Liger fused linear CE": liger_cross_entropy,
    "CCE": cce,
    "CCE torch.compile": cce_compiled,
}
