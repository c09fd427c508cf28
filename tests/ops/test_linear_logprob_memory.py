"""What linear_logprob costs (GEMMs, scratch memory), that it repeats itself bit for bit, and a vocabulary in shards."""

import copy
import multiprocessing
import os
import resource
import tempfile

import pytest
import torch
from head_cases import ALL_DIVERGENCES, BF16, DISTRIBUTION_FIELDS, F16, Case, available_bytes, drawn

from rlhf_kernels.ops.logprob import head, linear_logprob

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.usefixtures("kernels")
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
@pytest.mark.host
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


def assert_equal_bits(found: dict, wanted: dict, rows) -> None:
    for name, value in found.items():
        assert torch.equal(value, wanted[name][rows]), name


def part_of(case: Case, rows: torch.Tensor) -> Case:
    """The case with those of its rows, in that order."""
    part = copy.copy(case)
    for name in ("hidden", "target", "reference", "temperature"):
        setattr(part, name, getattr(case, name)[rows])
    part.lora = None if case.lora is None else (*case.lora[:2], case.lora[2][rows], case.lora[3])
    part.upstream = {name: g[rows] for name, g in case.upstream.items()}
    return part


REPEATED = {
    "bf16": {"dtype": BF16, "rows": 16},
    "bf16, many rows": {"dtype": BF16, "rows": 130, "vocabulary": 9001, "save": "grad_vector"},
    "recomputed": {"dtype": BF16, "rows": 70, "save": "recompute", "grads": DISTRIBUTION_FIELDS, "train": True},
    "fp32": {"rows": 70, "softcap": 9.0, "save": "logits"},
    "fp16, lora": {"dtype": F16, "rows": 16, "lora": True, "train": True, "bias": True},
}
# fp16 goes through the library's fp32 products on the CPU, which on some chips round by the row's place
OWN = {name: options for name, options in REPEATED.items() if options.get("dtype") != F16}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", REPEATED.values(), ids=REPEATED.keys())
def test_same_bits_on_every_run(options):
    case = Case(**options)
    first, grads = case.run(linear_logprob, lambda x: x)
    for _ in range(3):
        again, grads_again = case.run(linear_logprob, lambda x: x)
        assert_equal_bits(again, first, slice(None))
        assert_equal_bits(grads_again, grads, slice(None))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", OWN.values(), ids=OWN.keys())
def test_a_row_has_the_same_bits_at_any_place_and_beside_any_other_rows(options):
    """In a batch of the same number of rows that count: the others' contents and the row's place do not matter."""
    case = Case(**{**options, "temperature": "per row", "train": False, "ignored": ()})
    rows = len(case.target)
    fields, grads = case.run(linear_logprob, lambda x: x)
    order = drawn(rows, seed=3).argsort()
    moved, moved_grads = part_of(case, order).run(linear_logprob, lambda x: x)
    assert_equal_bits(moved, fields, order)
    assert torch.equal(moved_grads["hidden"], grads["hidden"][order])
    other = Case(**{**options, "temperature": "per row", "train": False, "ignored": (), "seed": 1})
    other.weight, other.bias, other.lora = case.weight, case.bias, case.lora
    for name in ("hidden", "reference", "target", "temperature"):
        getattr(other, name)[:5] = getattr(case, name)[:5]
    for name, g in other.upstream.items():
        g[:5] = case.upstream[name][:5]
    beside, beside_grads = other.run(linear_logprob, lambda x: x)
    assert_equal_bits({name: x[:5] for name, x in beside.items()}, fields, slice(5))
    assert torch.equal(beside_grads["hidden"][:5], grads["hidden"][:5])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", REPEATED.values(), ids=REPEATED.keys())
@pytest.mark.parametrize("count", [1, 7])
def test_a_row_among_fewer_differs_by_no_more_than_the_rounding_of_a_gemm(options, count):
    """The library chooses its kernel by the number of rows, so bits may differ; logits near 20 are rounded by 1e-6."""
    case = Case(**{**options, "temperature": "per row", "train": False, "ignored": (), "grads": ("logprob",)})
    fields, grads = case.run(linear_logprob, lambda x: x)
    few, few_grads = part_of(case, torch.arange(count)).run(linear_logprob, lambda x: x)
    for name, value in few.items():
        assert torch.allclose(value, fields[name][:count], rtol=1e-5, atol=2e-5), name
    change = (few_grads["hidden"] - grads["hidden"][:count]).float().norm()
    assert change <= {BF16: 1e-2, F16: 1e-3}.get(case.hidden.dtype, 1e-5) * grads["hidden"][:count].float().norm()


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


@pytest.mark.usefixtures("kernels")
@pytest.mark.host
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


@pytest.mark.host
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


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(available_bytes() < 14 << 30, reason="needs 14 GiB of free memory")
@pytest.mark.parametrize("rows", [4, 64])
def test_a_weight_of_more_than_2_to_the_31_elements(rows):
    """Offsets into the weight's last rows exceed 32 bits; the tokens that matter lie there."""
    vocabulary, width = 151_936, 14_208
    weight = torch.empty(vocabulary, width, dtype=BF16)
    assert weight.numel() > 2**31
    tile = (drawn(1024, width, seed=1) / width**0.5).to(BF16)
    for start in range(0, vocabulary, 1024):
        weight[start : start + 1024] = tile[: vocabulary - start]
        weight[start : start + 1024, 0] = start / vocabulary  # each block has logits of its own
    hidden = (drawn(rows, width, seed=2) * 3).to(BF16).requires_grad_()
    target = vocabulary - 1 - torch.arange(rows)
    out = linear_logprob(hidden, weight, target, entropy=True)
    out.logprob.sum().backward()
    z = torch.cat([hidden.detach().double() @ weight[i : i + 4096].double().t() for i in range(0, vocabulary, 4096)], 1)
    lp = z.log_softmax(1)
    assert torch.allclose(out.logprob.double(), lp.gather(1, target[:, None]).squeeze(1), atol=2e-5)
    assert torch.allclose(out.entropy.double(), -(lp.exp() * lp).sum(1), atol=2e-4)
    d = -lp.exp()
    d[torch.arange(rows), target] += 1
    exact = sum(d[:, i : i + 4096] @ weight[i : i + 4096].double() for i in range(0, vocabulary, 4096))
    assert (hidden.grad.double() - exact).norm() <= 1e-2 * exact.norm()
