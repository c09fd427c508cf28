"""`sample` from logits to tokens and logprobs, beside torch's softmax and multinomial and beside a read of the logits.

Rows are normal with a standard deviation of 3, a language model's spread.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.case import OURS, Case, Prepare, Target, ready
from rlhf_kernels.ops.sampling import sample

READ = "read of the logits"
TORCH = "torch softmax + multinomial"
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "greedy": {"greedy": True},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 50, top_p 0.9, min_p 0.02": {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
}
SHAPES = ((64, 8192), (64, 151936), (1, 151936))


def cases(device: str = "cpu") -> Iterator[Case]:
    for rows, vocabulary in SHAPES:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            yield _case(f"{rows} x {vocabulary} {name}", rows, vocabulary, dtype, device)


def _case(name: str, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        torch.manual_seed(0)
        n, v = (2, 300) if tiny else (rows, vocabulary)
        logits = (torch.randn(n, v, device=device) * 3).to(dtype)
        keys = torch.arange(n, device=device)
        found = {
            READ: ready(logits.amax),
            TORCH: ready(lambda: torch.multinomial(torch.softmax(logits.float(), -1), 1)),
        }
        for text, filters in FILTERS.items():
            shown = OURS if text == "no filter" else f"{OURS}, {text}"
            found[shown] = ready(partial(sample, logits, seed=0, stream=keys, position=keys, **filters))
        return found

    return Case(name, build, TORCH, (Target(TORCH, at_least=5.0),), memory=False)
