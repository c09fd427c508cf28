"""What linear_logprob costs (GEMMs, scratch memory), that it repeats itself bit for bit, and a vocabulary in shards."""

import multiprocessing
import os
import resource
import tempfile

import pytest
import torch
from head_cases import ALL_DIVERGENCES, BF16, Case

from rlhf_kernels.ops.logprob import head, linear_logprob


@pytest.mark.parametrize(
    ("grads", "save", "grad_mode", "products"),
    [
        ((), "auto", True, 1),
        (("logprob",), "auto", False, 1),
        (("logprob",), "auto", True, 2),
        (("logprob",), "recompute", True, 3),
        (("logprob", "entropy"), "auto", True, 3),
    ],
)
def test_number_of_gemms(monkeypatch, grads, save, grad_mode, products):
    """One product for the logits, one a gradient of hidden; none of them for what nobody differentiates."""
    hidden, weight = torch.randn(8, 16, requires_grad=True), torch.randn(40, 16)
    count = 0
    mm, add = head.mm_fp32, head.Pullback.add

    def counted(original):
        def call(*args):
            nonlocal count
            count += 1
            return original(*args)

        return call

    monkeypatch.setattr(head, "mm_fp32", counted(mm))
    monkeypatch.setattr(head.Pullback, "add", counted(add))
    with torch.set_grad_enabled(grad_mode):
        out = linear_logprob(hidden, weight, torch.arange(8), entropy=True, grad_fields=grads, save=save)
    if grad_mode and grads:
        sum(getattr(out, name).sum() for name in grads).backward()
    assert count == products


@pytest.mark.parametrize("save", ["auto", "recompute"])
def test_same_bits_on_every_run_and_beside_any_other_rows(save):
    case = Case(BF16, rows=16, ignored=(), save=save)
    first, grads = case.run(linear_logprob, lambda x: x)
    again, grads_again = case.run(linear_logprob, lambda x: x)
    for a, b in zip(first, again):
        assert torch.equal(a, b)
    assert torch.equal(grads["hidden"], grads_again["hidden"])


def peak_growth(vocabulary: int, results) -> None:
    torch.set_num_threads(1)
    rows, width = 256, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width)
    target = torch.randint(vocabulary, (rows,))
    small = {"entropy": True, "grad_fields": ("logprob", "entropy")}
    linear_logprob(hidden[:2], weight[:100], target[:2] % 100, **small).logprob.sum().backward()  # warm libraries
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linear_logprob(hidden, weight, target).logprob.sum().backward()
    out = linear_logprob(hidden, weight, target, **small)
    (out.logprob + out.entropy).sum().backward()
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def test_scratch_memory_is_a_block_not_the_logits():
    context = multiprocessing.get_context("spawn")
    results, vocabulary = context.Queue(), 120_000
    process = context.Process(target=peak_growth, args=(vocabulary, results))
    process.start()
    grown = results.get(timeout=120)
    process.join()
    assert grown < 256 * vocabulary * 4 / 6  # 20 MB of the logits' 123 MB


def shard_worker(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    hidden, weight, reference = torch.randn(6, 16) * 2, torch.randn(101, 16), torch.randn(6, 16) * 2
    a, b = torch.randn(2, 16), torch.randn(101, 2)
    target = torch.tensor([0, 59, 60, 100, -100, 7])
    mine = slice(0, 60) if rank == 0 else slice(60, 101)
    worst = 0.0
    for fields in (("logprob",), ("logprob", "lse", "entropy", "kl", "rkl", "js")):
        for train in (False, True):
            made = []
            for group, part in ((None, slice(None)), (torch.distributed.group.WORLD, mine)):
                x, w = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_(train)
                low = (a.clone().requires_grad_(train), b[part].clone().requires_grad_(train), None, 0.5)
                out = linear_logprob(
                    x, w, target, ref_hidden=reference, entropy=True, divergence=ALL_DIVERGENCES, softcap=8.0,
                    lora=low, grad_fields=fields, tp_group=group,
                )  # fmt: skip
                sum((i + 1) * getattr(out, f).sum() for i, f in enumerate(fields)).backward()
                extra = [w.grad, low[1].grad] if train else []
                made.append([*out, x.grad, *([low[0].grad] if train else []), *extra])
            whole, sharded = made
            if train:
                whole[-2:] = [g[mine] for g in whole[-2:]]
            worst = max(worst, *(float(((p - q).abs() / (1 + p.abs())).max()) for p, q in zip(whole, sharded)))
    results.put(worst)
    torch.distributed.destroy_process_group()


def test_a_vocabulary_split_over_two_ranks_gives_the_whole_one():
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [context.Process(target=shard_worker, args=(r, os.path.join(folder, "s"), results)) for r in (0, 1)]
        for worker in workers:
            worker.start()
        worst = [results.get(timeout=120) for _ in workers]
        for worker in workers:
            worker.join()
    assert max(worst) < 2e-5
