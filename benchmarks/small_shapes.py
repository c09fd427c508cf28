"""Every op, forward and backward, on shapes small enough for compute-sanitizer: `python -m benchmarks.small_shapes`.

The sizes are awkward on purpose (no multiples of a vector's width or a block's), and results must be finite.
"""

import argparse
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from rlhf_kernels import (
    build_routing,
    gae,
    linear_logprob,
    logprob,
    lora_linear,
    lora_linears,
    masked_whiten,
    sample,
)
from rlhf_kernels.generation.arena import Arena
from rlhf_kernels.ops.attention import sliced_attention, varlen_attention

Save = Literal["grad_vector", "recompute", "logits"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FIELDS = ("logprob", "lse", "entropy", "kl", "rkl", "js")


def head() -> None:
    for dtype in DTYPES:
        for rows, width, vocabulary in ((3, 33, 123), (70, 72, 5003)):
            for save in get_args(Save):
                _head_once(dtype, rows, width, vocabulary, save)


def _head_once(dtype: torch.dtype, rows: int, width: int, vocabulary: int, save: Save) -> None:
    trained = save != "grad_vector"
    hidden, reference = torch.randn(2, rows, width).to(dtype).unbind()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_(trained)
    target = torch.arange(rows) * 37 % vocabulary
    target[1] = -100
    fields = FIELDS if trained else ("logprob",)
    for softcap in (None, 5.0):
        out = linear_logprob(
            hidden.requires_grad_(), weight, target, bias=torch.randn(vocabulary), softcap=softcap, save=save,
            temperature=torch.rand(rows) + 0.5, entropy=True, ref_hidden=reference, grad_fields=fields,
            divergence=("kl", "rkl", "js", "k1", "k2", "k3"),
        )  # fmt: skip
        torch.stack([getattr(out, name) for name in fields]).sum().backward()
        _finite(*out, hidden.grad)


def logprobs() -> None:
    for dtype in DTYPES:
        for rows, vocabulary in ((1, 1), (3, 123), (5, 9001)):
            for inplace in (False, True):
                logits = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
                held = logits * 1
                out = logprob(held, torch.zeros(rows, dtype=torch.long), entropy=True, inplace_backward=inplace)
                assert out.entropy is not None
                (out.logprob + out.lse + out.entropy).sum().backward()
                _finite(*out, logits.grad)


def lora() -> None:
    for dtype in DTYPES:
        for adapters in dict.fromkeys((dtype, torch.float32)):  # up to 64 rows take the kernel of few rows
            _lora_once(dtype, 1, 40, (56,), (5,), adapters)
            _lora_once(dtype, 37, 33, (41, 7, 24), (3, 16, 1), adapters)
            _lora_once(dtype, 64, 520, (300, 24), (8, 136, 16), adapters)
        _lora_once(dtype, 70, 33, (41, 7, 24), (3, 16, 1), dtype)
    _lora_once(torch.bfloat16, 200, 72, (136,), (16, 64), torch.float32)
    _lora_once(torch.bfloat16, 200, 48, (40, 24), (4, 8, 5) * 4, torch.bfloat16)  # so many that rows are sorted
    x, weight = torch.randn(4, 10, 40, requires_grad=True), torch.randn(56, 40)
    a, b = torch.randn(3, 5, 40, requires_grad=True), torch.randn(3, 56, 5, requires_grad=True)
    y = lora_linear(x, weight, a, b, torch.arange(4) - 1, 0.5, ranks=(5, 2, 3), grad_rows=20)
    y.sum().backward()
    _finite(y, x.grad, a.grad, b.grad)


def _lora_once(
    dtype: torch.dtype, rows: int, width: int, columns: tuple[int, ...], ranks: tuple[int, ...], adapters: torch.dtype
) -> None:
    x = torch.randn(rows, width).to(dtype).requires_grad_()
    weights = [(torch.randn(n, width) / width**0.5).to(dtype) for n in columns]
    a, b = (
        [[torch.randn(shape(n, r)).to(adapters).requires_grad_() for r in ranks] for n in columns]
        for shape in (lambda n, r: (r, width), lambda n, r: (n, r))
    )
    routing = build_routing(torch.arange(rows) * 5 % (len(ranks) + 1) - 1, len(ranks))
    with torch.no_grad():
        _finite(*lora_linears(x, weights, a, b, None, 0.5, routing=routing))
    ys = lora_linears(x, weights, a, b, None, 0.5, routing=routing)
    torch.cat([y.sum().view(1) for y in ys]).sum().backward()
    _finite(*ys, x.grad, *(t.grad for some in (*a, *b) for t in some))


def attention() -> None:
    for dtype in DTYPES:
        for heads, kv_heads, d, dv in ((3, 1, 20, 17), (4, 2, 64, 64)):
            for window, softcap in ((None, None), (5, 3.0)):
                options = {"window": window, "softcap": softcap}
                _attention_once(dtype, heads, kv_heads, d, dv, options)


def _attention_once(dtype: torch.dtype, heads: int, kv_heads: int, d: int, dv: int, options: dict[str, Any]) -> None:
    def rows(tokens: int, of: int, dim: int) -> torch.Tensor:
        return torch.randn(tokens, of, dim).to(dtype)

    def counts(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    q, k, v = (x.requires_grad_() for x in (rows(75, heads, d), rows(75, kv_heads, d), rows(75, kv_heads, dv)))
    out = varlen_attention(q, k, v, counts(0, 3, 3, 75), **options)
    out.float().square().sum().backward()
    _finite(out, q.grad, k.grad, v.grad)
    arena = Arena([(kv_heads, d, dv)], "1MiB", 3, dtype, out.device)
    arena.write(0, torch.arange(75), k, v)
    table = torch.arange(25, dtype=torch.int32).repeat(2, 30)[:, :240]  # wide: the keys are split
    for new in ((1, 1), (1, 40)):
        place = counts(0, new[0], sum(new))
        _finite(sliced_attention(q[: sum(new)], arena, 0, table, counts(70, 51), place, **options))


def others() -> None:
    for dtype in DTYPES:
        for rows, vocabulary in ((9, 1003), (2, 17003)):  # the latter in several blocks a row, where there are clusters
            drawn = sample(
                torch.randn(rows, vocabulary).to(dtype), top_k=7, top_p=0.9, min_p=0.01, seed=1, stream=2,
                position=torch.arange(rows), greedy=torch.arange(rows) == 1,
            )  # fmt: skip
            _finite(*drawn)
    rewards, values = torch.randn(2, 3, 1031, requires_grad=True).unbind()
    mask = torch.rand(3, 1031) < 0.8
    for kept in (None, mask):
        advantages, returns = gae(rewards, values, kept)
        (gradient,) = torch.autograd.grad((advantages + returns).sum(), rewards)
        _finite(advantages, returns, gradient, masked_whiten(advantages.detach(), kept))


def _finite(*tensors: torch.Tensor | None) -> None:
    for x in tensors:
        if x is None or not x.isfinite().all():
            raise FloatingPointError("an op gave a number that is not finite, or no gradient")


OPS: dict[str, Callable[[], None]] = {
    "head": head,
    "logprob": logprobs,
    "lora": lora,
    "attention": attention,
    "others": others,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_shapes", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", choices=("all", *OPS), default="all")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    for name, run in OPS.items():
        if args.ops in ("all", name):
            run()
            print(f"{name}: done")
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
