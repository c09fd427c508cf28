"""Logprobs from hidden states, forward and backward through a frozen head: ours beside eager PyTorch."""

import torch

from benchmarks.runner import Case
from rlhf_kernels import linear_logprob

SHAPES = {"256 x 896 x 32000 fp32": (256, 896, 32000, torch.float32)}


def case(name: str, rows: int, width: int, vocab: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    target = torch.randint(vocab, (rows,))

    def eager() -> None:
        logits = (hidden @ weight.T).float()
        logits.log_softmax(-1).gather(-1, target[:, None]).sum().backward()

    def ours() -> None:
        linear_logprob(hidden, weight, target).logprob.sum().backward()

    return Case(name, {"eager": eager, "rlhf_kernels": ours}, base="eager")


def cases() -> list[Case]:
    return [case(name, *shape) for name, shape in SHAPES.items()]
