"""What the KV budget holds generation to: the same tokens at every budget, and no more bytes than it says.

Bytes are the allocator's, not the engine's: what stays allocated from one step to the next, beyond what was allocated
before the call. On a CUDA device that is `torch.cuda.memory_allocated`; on the CPU glibc's count of the blocks that it
maps by themselves, those of `LARGE` and more, in a process of its own, since the threshold stays as it is set. Run in
fp32, where what a budget changes (how many rows a GEMM has) is too little to change a token.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.case import Check, Unavailable
from benchmarks.generation_ours import sampled
from benchmarks.generation_work import SLICE_TOKENS, Draws, Llama, Work
from benchmarks.machine import ROOT
from rlhf_kernels.generation import Rollout, SlicedGenerator

SHARES = (1, 2, 4, 8, 16)  # of the bytes that hold every sequence whole at once
LARGE = 1 << 16
PAGE = 4096
M_MMAP_THRESHOLD = -3
ACTIVE = 64
TIMEOUT_S = 300


def budgets(model: Llama, draws: Draws, dtype: torch.dtype = torch.bfloat16) -> list[int]:
    """Bytes for all sequences whole at once, for half of that, ..., never for less than the longest sequence."""
    slices = [draws.slices(i) for i in range(len(draws.prompts))]
    each = SLICE_TOKENS * model.token_bytes(dtype)
    return [each * max(sum(slices) // share, max(slices)) for share in SHARES]


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2; `hblks` and `hblkhd` are the number and the bytes of blocks mapped by themselves."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated(device: str) -> Callable[[], int]:
    """A function that tells the bytes allocated now; Unavailable where the allocator does not tell."""
    if device == "cuda":
        return torch.cuda.memory_allocated
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        raise Unavailable("the allocator does not tell what it holds")
    libc.mallopt(M_MMAP_THRESHOLD, LARGE)
    libc.mallinfo2.restype = MallInfo

    def mapped() -> int:
        info = libc.mallinfo2()
        return info.hblkhd - PAGE * info.hblks  # each is rounded up to whole pages, with its header

    return mapped


def sweep(model: Llama, work: Work, device: str) -> tuple[float, int]:
    """The largest share of a budget that was held from step to step; tokens unlike those of the whole budget."""
    held = allocated(device)
    lm, draws, most, outcomes = model.build(device, torch.float32), work.draw(), 0.0, []
    params, all_bytes = sampled(draws.new), budgets(model, draws, torch.float32)
    first = SlicedGenerator(lm, all_bytes[0], max_active=ACTIVE)
    first.generate(draws.prompts, sampled([min(new, 2) for new in draws.new]))  # what is made once is no sequence's
    first.sleep()
    for budget in all_bytes:
        generator = SlicedGenerator(lm, budget, max_active=ACTIVE)
        before, peak, rollouts = held(), 0, list[Rollout]()
        for rollout in generator.stream(draws.prompts, params):
            peak = max(peak, held() - before)
            rollouts.append(rollout)
        generator.sleep()
        if peak < budget // 2:  # the arena came from blocks that were freed before, and was not seen
            raise Unavailable("the allocator did not map the keys and values")
        most = max(most, peak / budget)
        outcomes.append([r.tokens for r in sorted(rollouts, key=lambda r: r.prompt_index)])
    whole = [token for tokens in outcomes[0] for token in tokens]
    assert len(whole) == draws.tokens
    return most, sum(a != b for one in outcomes[1:] for a, b in zip(whole, [t for tokens in one for t in tokens]))


def checks(model: Llama, work: Work, device: str) -> list[Check]:
    """`sweep` in a process of its own; Unavailable where the allocator does not tell."""
    numbers = [model.layers, model.width, model.inner, model.heads, model.kv_heads, model.vocabulary, model.positions]
    given = ["--model", *numbers, "--work", work.prompts, *work.prompt, *work.new, work.vocabulary]
    command = [sys.executable, "-m", "benchmarks.generation_budget", device, *map(str, given)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"took more than {TIMEOUT_S} s") from None
    if done.returncode:
        raise RuntimeError(f"the sweep of budgets failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in found:
        raise Unavailable(found["unavailable"])
    return [
        Check("bytes held from step to step, of the budget", found["held"], 1.0, "share"),
        Check("fp32 tokens that a smaller budget changes", found["differ"], 0, "count"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation_budget")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--model", type=int, nargs=7, required=True)
    parser.add_argument("--work", type=int, nargs=6, required=True)
    args = parser.parse_args()
    prompts, *sizes, vocabulary = args.work
    work = Work(prompts, (sizes[0], sizes[1]), (sizes[2], sizes[3]), vocabulary=vocabulary)
    try:
        held, differ = sweep(Llama(*args.model), work, args.device)
    except Unavailable as why:
        print(json.dumps({"unavailable": str(why)}))
        return
    print(json.dumps({"held": held, "differ": differ}))


if __name__ == "__main__":
    main()
