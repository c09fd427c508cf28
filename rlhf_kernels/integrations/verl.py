"""verl's fused head under verl's names: log-probabilities and entropy from hidden states, computed by `linear_logprob`.

verl's actor has two: `linear_cross_entropy` (its Triton kernel) and `FusedLinearForPPO` (chunks in PyTorch). Both are
here with their arguments and shapes, for a loop of one's own; `patch` puts them in verl's place. No [rows, V] is kept.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from rlhf_kernels.ops.logprob import linear_logprob

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("none", "sum", "mean")
PLACES = {  # verl's module -> what it has under which name
    "verl.utils.kernel.linear_cross_entropy": "linear_cross_entropy",
    "verl.utils.experimental.torch_functional": "FusedLinearForPPO",
}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    dist_process_group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) of softmax(hidden weight^T / temperature), as verl.utils.kernel.linear_cross_entropy's.

    Args:
        hidden: [..., H];  weight: [V, H], or this rank's rows of it with `dist_process_group`.
        labels: int [...], already shifted; -100 gives 0, without gradient and not counted by "mean".
        temperature: > 0, a number or one for each label.
        reduction: of logprobs; "none" keeps one for each label. Entropy is never reduced.

    Returns: logprobs fp32 [...] (or a scalar) and entropy fp32 [...], in nats. Both are differentiable in hidden and
        weight, each with an upstream gradient of its own.
    Raises: ValueError for another reduction; what `linear_logprob` raises.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    out = linear_logprob(
        hidden, weight, labels, temperature=temperature, entropy=True, grad_fields=("logprob", "entropy"),
        tp_group=dist_process_group,
    )  # fmt: skip
    logprob, entropy = out.logprob, out.entropy
    assert entropy is not None
    if reduction == "none":
        return logprob, entropy
    total = logprob.sum()
    return total if reduction == "sum" else total / (labels != -100).sum(), entropy


class FusedLinearForPPO(nn.Module):
    """verl.utils.experimental.torch_functional.FusedLinearForPPO; results are fp32, whatever `hidden_states` is."""

    def __init__(self, chunk_size: int = 512) -> None:
        """`chunk_size` (rows at a time) is taken for verl's sake: memory is a block of the vocabulary either way."""
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), each fp32 [...], of hidden_states [..., H], vocab_weights [V, H] and input_ids [...],
        which are already shifted; see `linear_cross_entropy`.
        """
        return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def patch() -> Callable[[], None]:
    """Puts both in verl's place, for the forwards of `use_fused_kernels=True`; returns a function that undoes it.

    verl's forwards import the names as they run, so models that are patched already are served too; call it in every
    worker. ImportError where verl is not installed; AttributeError where this verl lacks one of the two: then nothing
    is changed.
    """
    modules = {name: importlib.import_module(name) for name in PLACES}
    before = {name: getattr(module, PLACES[name]) for name, module in modules.items()}
    for name, module in modules.items():
        setattr(module, PLACES[name], globals()[PLACES[name]])

    def undo() -> None:
        for name, module in modules.items():
            setattr(module, PLACES[name], before[name])

    return undo
