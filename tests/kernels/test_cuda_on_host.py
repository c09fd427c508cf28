"""The CUDA row passes of linear_logprob, run on the CPU, against float64 and against the CPU's own row passes."""

import sys
from pathlib import Path

import cuda_host
import pytest
import torch

from rlhf_kernels.ops.logprob import checks, head, linear_logprob, naive, native, rows

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))
from head_cases import BF16, DISTRIBUTION_FIELDS, as_exact_as_plain, logits_head

pytestmark = pytest.mark.skipif(cuda_host.compiler_missing(), reason=f"{cuda_host.COMPILER} is not installed")
F64 = torch.float64
SHAPES = [(1, 1), (7, 5), (33, 123), (3, 1024), (2, 4096), (3, 5003), (2, 9001)]  # the last needs two tiles
SHAPINGS = {
    "plain": {},
    "temperature": {"temperature": "per row", "scale": 1.3},
    "softcap and bias": {"softcap": 9.0, "bias": True, "temperature": "per row"},
}


@pytest.fixture(scope="module")
def passes():
    return cuda_host.HostPasses(cuda_host.compile_library("cuda_rows_on_host.cpp"))


class Block:
    """A block of logits of two models, targets (some of them in other blocks), and how raw logits become z."""

    def __init__(self, shape=(7, 123), *, softcap=0.0, scale=1.0, bias=False, temperature=None, noise=0.1, offset=0):
        count, n = shape
        memory = torch.randn(2, count * n + offset) * 3  # `offset` elements move rows off 16-byte boundaries
        self.z = memory[0, offset:].view(count, n)
        self.zr = self.z + noise * torch.randn(count, n)
        self.target = torch.randint(-n // 4 - 1, n + n // 4 + 1, (count,))
        self.target[0] = n // 2
        self.bias = torch.randn(n) if bias else None
        self.temperature = torch.rand(count) + 0.5 if temperature else torch.ones(count)
        self.softcap, self.scale = softcap, scale

    def copies(self):
        """z and zr, writable, at the same place relative to 16 bytes."""
        return [torch.empty(x.numel() + x.data_ptr() % 16 // 4)[-x.numel() :].view_as(x).copy_(x) for x in self.both()]

    def both(self):
        return self.z, self.zr

    @property
    def shaping(self):
        return self.bias, self.temperature, self.softcap, self.scale

    def exact(self):
        """z and zr in float64."""
        out = [x.double() for x in self.both()]
        bias = None if self.bias is None else self.bias.double()
        for x in out:
            rows.transform(x, bias, self.temperature.double(), self.softcap, self.scale)
        return out


def stats(ops, block, z, zr, kl, rkl, raw=True):
    state = torch.full((10, len(z)), float("nan"), dtype=F64)
    ops.head_stats(z, zr, block.target, *block.shaping, raw, kl, rkl, state)
    return state


def close(value, truth, rel, absolute=1e-12):
    torch.testing.assert_close(value.double(), truth.double(), rtol=rel, atol=absolute, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", SHAPINGS.values(), ids=SHAPINGS)
def test_statistics_follow_the_definition(passes, shape, options):
    block = Block(shape, **options)
    z, zr = block.copies()
    state = stats(passes, block, z, zr, kl=True, rkl=True)
    shaped, shaped_ref = block.exact()
    close(z, shaped, 2e-6, 2e-6)
    close(zr, shaped_ref, 2e-6, 2e-6)
    truth = stats(rows, block, z.double(), zr.double(), True, True, raw=False)
    close(state[:8], truth[:8], 2e-6, 5e-7)
    close(state[8:], truth[8:], 5e-5, 1e-10)


@pytest.mark.parametrize(("kl", "rkl"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("reference", [False, True])
def test_statistics_are_those_of_the_cpu_ops(passes, kl, rkl, reference):
    if not native.AVAILABLE:
        pytest.skip("the compiled ops are not built")
    block = Block((9, 700), temperature="per row")
    found = []
    for ops in (passes, torch.ops.rlhf_kernels):
        z, zr = block.copies()
        found.append(stats(ops, block, z, zr if reference else None, kl and reference, rkl and reference))
    close(found[0], found[1], 2e-6, 5e-7)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_a_small_kl_keeps_its_digits(passes, noise):
    block = Block((8, 3001), noise=noise)
    block.z = (block.z * 2**16).round() / 2**16
    block.zr = block.z + (noise * torch.randn(8, 3001) * 2**20).round() / 2**20  # zr - z stays exact
    state = stats(passes, block, *block.copies(), True, True)
    truth = stats(rows, block, *block.exact(), True, True, raw=False)
    for name in (8, 9):
        assert ((state[name] - truth[name]).abs() / truth[name]).median() < 2e-4
        assert (state[name] >= 0).all()


@pytest.mark.parametrize("gap", [50.0, 100.0, 300.0])
def test_rows_whose_mass_lies_on_different_tokens(passes, gap):
    block = Block((3, 300), noise=0.0)
    block.z[0, 5], block.zr[0, 200], block.z[1, 7], block.zr[2, 7] = gap, gap, gap, gap
    state = stats(passes, block, *block.copies(), True, True)
    truth = stats(rows, block, *block.exact(), True, True, raw=False)
    close(state, truth, 2e-6, 1e-7 * gap)  # the log ratio is a difference of logits of that size


def test_a_sure_target_keeps_the_digits_of_what_remains(passes):
    block = Block((4, 5003))
    for i, gap in enumerate((14.0, 24.0, 40.0, 80.0)):
        block.target[i] = 1000 * i
        block.z[i, 1000 * i] = gap
    state = stats(passes, block, block.copies()[0], None, False, False)
    others = block.z.double().scatter(1, block.target[:, None], float("-inf"))
    close(state[1], others.logsumexp(1), 0, 5e-7)
    truth = torch.distributions.Categorical(logits=block.z.double()).entropy()
    close(state[3], truth, 2e-6, 1e-14)


def test_rows_of_nan_and_masked_tokens_come_out_as_from_the_cpu_ops(passes):
    if not native.AVAILABLE:
        pytest.skip("the compiled ops are not built")
    block = Block((8, 261))
    nan, masked = float("nan"), float("-inf")
    block.target[:] = torch.tensor([3, 3, 3, 3, 3, 3, 300, 3])
    block.z[1, 17], block.zr[2, 17], block.z[3], block.zr[4], block.z[5] = nan, nan, nan, nan, masked
    block.zr[6], block.z[7, 4:], block.zr[7, :250] = masked, masked, masked
    for kl, rkl in ((True, True), (True, False), (False, True), (False, False)):
        found = [stats(ops, block, *block.copies(), kl, rkl) for ops in (passes, torch.ops.rlhf_kernels)]
        close(found[0], found[1], 2e-6, 5e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", SHAPINGS.values(), ids=SHAPINGS)
def test_exponentials_over_two_blocks(passes, shape, options):
    found = {}
    for name, ops, dtype in (("cuda", passes, torch.float32), ("exact", rows, F64)):
        torch.manual_seed(1)
        shift, factor = (torch.full((shape[0],), float("nan"), dtype=dtype) for _ in range(2))
        mass, target_z = torch.zeros(shape[0], dtype=F64), torch.full((shape[0],), float("-inf"), dtype=F64)
        blocks = []
        for first in (True, False):
            block = Block(shape, **options)
            if not first and not block.softcap:
                block.z[0] += 100  # exceeds the first block's maximum by more than 60
            z = block.copies()[0] if dtype != F64 else block.z.double()
            given = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in block.shaping[:2]]
            ops.head_exp(z, block.target, *given, *block.shaping[2:], True, first, shift, mass, factor, target_z)
            blocks.append(z)
        found[name] = (*blocks, shift, mass, factor, target_z)
    for value, truth in zip(found["cuda"], found["exact"]):
        close(value, truth, 3e-5, 1e-6)
    assert (found["cuda"][4] < 1).any() == (shape[1] > 1 and "softcap" not in options)


@pytest.mark.parametrize("first", [True, False])
def test_exponentials_of_nan_and_masked_rows_are_those_of_the_cpu_ops(passes, first):
    if not native.AVAILABLE:
        pytest.skip("the compiled ops are not built")
    block = Block((6, 261))
    block.target[:] = torch.tensor([3, 3, 3, -7, 3, 300])
    block.z[1, 17], block.z[2], block.z[3], block.z[4, 4:] = float("nan"), float("nan"), float("-inf"), float("-inf")
    found = []
    for ops in (passes, torch.ops.rlhf_kernels):
        z, shift, factor = block.copies()[0], torch.ones(6), torch.zeros(6)
        mass, target_z = torch.full((6,), 0.5, dtype=F64), torch.full((6,), -5.0, dtype=F64)
        ops.head_exp(z, block.target, *block.shaping, True, first, shift, mass, factor, target_z)
        found.append((z, shift, mass, factor, target_z))
    for value, expected in zip(*found):
        close(value, expected, 2e-6, 1e-9)


@pytest.mark.parametrize("options", SHAPINGS.values(), ids=SHAPINGS)
@pytest.mark.parametrize("shape", [(7, 5), (3, 5003), (2, 9001)], ids=str)
def test_js_shares(passes, shape, options):
    block = Block(shape, noise=0.5, **options)
    z, zr = block.exact()
    lse, ratio = z.logsumexp(1), zr.logsumexp(1) - z.logsumexp(1)
    two, ratio32 = torch.stack((lse.float(), (lse - lse.float()).float())), ratio.float()
    found, truth = torch.ones(2, shape[0], dtype=F64), torch.ones(2, shape[0], dtype=F64)
    passes.head_js(*block.copies(), *block.shaping, True, two, ratio32, found)
    rows.head_js(z, zr, None, torch.ones(shape[0]), 0.0, 1.0, False, two.double(), ratio32.double(), truth)
    close(found - 1, truth - 1, 2e-5, 1e-6)


@pytest.mark.parametrize("reference", [False, True], ids=["alone", "with a reference"])
@pytest.mark.parametrize("options", SHAPINGS.values(), ids=SHAPINGS)
@pytest.mark.parametrize("shape", [(7, 5), (33, 123), (2, 4096), (2, 9001)], ids=str)
def test_gradients_of_the_logits(passes, shape, options, reference):
    block = Block(shape, **options)
    z, zr = block.exact()
    lse = z.logsumexp(1)
    coefficients = torch.randn(10, shape[0])
    coefficients[0], coefficients[1] = lse.float(), (lse - lse.float()).float()
    coefficients[2] = zr.logsumexp(1) - lse
    given = [None if block.bias is None else block.bias.double(), block.temperature.double(), *block.shaping[2:]]
    truth, other = block.z.double(), block.zr.double() if reference else None
    rows.head_grad(truth, other, block.target, *given, True, coefficients.double(), None)
    found, found_ref = block.copies()
    passes.head_grad(
        found, found_ref if reference else None, block.target, *block.shaping, True, coefficients, None
    )  # fmt: skip
    close(found, truth, 2e-5, 2e-6)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_off_the_16_byte_boundaries_make_no_difference(passes, offset):
    torch.manual_seed(2)
    aligned = Block((5, 515))
    moved = Block((5, 515), offset=offset)
    moved.z, moved.target, moved.zr = moved.z.copy_(aligned.z), aligned.target, moved.zr.copy_(aligned.zr)
    found = []
    for block in (aligned, moved):
        z, zr = block.copies()
        assert z.data_ptr() % 16 == (4 * offset % 16 if block is moved else 0)
        found.append((stats(passes, block, z, zr, True, True), z))
        sums = torch.zeros(5, dtype=F64)
        given = torch.zeros(5), sums, torch.zeros(5), torch.zeros(5, dtype=F64)
        passes.head_exp(z, block.target, *block.shaping, False, True, *given)
    close(found[0][0], found[1][0], 1e-6, 5e-7)
    close(found[0][1], found[1][1], 1e-6, 1e-9)


def test_no_rows_are_no_launch(passes):
    block = Block((1, 50))
    empty, none = torch.empty(0, 50), torch.empty(0, dtype=torch.long)
    state = torch.empty(10, 0, dtype=F64)
    passes.head_stats(empty, None, none, *block.shaping, True, False, False, state)


def every_pass(passes, block):
    """What each pass writes, from the same inputs."""
    count = len(block.target)
    z, zr = block.copies()
    found = [stats(passes, block, z, zr, True, True), z, zr]
    z, zr = block.copies()
    sums, two = torch.zeros(2, count, dtype=F64), torch.stack((z.logsumexp(1), torch.zeros(count)))
    passes.head_js(z, zr, *block.shaping, True, two, torch.zeros(count), sums)
    z, zr = block.copies()
    passes.head_grad(z, zr, block.target, *block.shaping, True, torch.ones(10, count), None)
    found += [sums, z]
    z, shift, factor = block.copies()[0], torch.zeros(count), torch.zeros(count)
    mass, target_z = torch.zeros(count, dtype=F64), torch.zeros(count, dtype=F64)
    passes.head_exp(z, block.target, *block.shaping, True, True, shift, mass, factor, target_z)
    found += [z, shift, mass, factor, target_z]
    out, grad = torch.zeros(5, count), torch.zeros(block.z.shape)
    passes.logprob_rows(block.z, block.target, block.temperature, -100, out)
    passes.logprob_rows_backward(block.z, block.target, block.temperature, -100, torch.ones(6, count), grad)
    return [*found, out, grad]


@pytest.mark.parametrize("shape", [(3, 123), (2, 1240), (2, 5003)], ids=str)
def test_no_result_depends_on_the_order_in_which_threads_run(passes, shape):
    block = Block(shape, softcap=9.0, temperature="per row")
    forwards = every_pass(passes, block)
    with passes.backwards():
        backwards = every_pass(passes, block)
    for one, other in zip(forwards, backwards):
        assert torch.equal(one.nan_to_num(1e9), other.nan_to_num(1e9))


def test_a_run_repeats_bit_for_bit_and_a_row_does_not_depend_on_the_others(passes):
    block = Block((6, 1240))  # a width of whole groups: elsewhere a row's place decides how its columns are grouped
    first, second = (stats(passes, block, *block.copies(), True, True) for _ in range(2))
    assert torch.equal(first, second)
    alone = Block((1, 1240))
    alone.z, alone.zr, alone.target = block.z[4:5], block.zr[4:5], block.target[4:5]
    assert torch.equal(stats(passes, alone, *alone.copies(), True, True)[:, 0], first[:, 4])


def test_no_pass_reads_or_writes_outside_its_arrays():
    code = """
import torch
from cuda_host import HostPasses
passes = HostPasses(library)
def exact(*shape, dtype=torch.float32, offset=0):  # ends where its memory ends
    import ctypes
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    count = 1
    for n in shape:
        count *= n
    size = (count + offset) * torch.empty(0, dtype=dtype).element_size()
    memory = (ctypes.c_char * size).from_address(libc.malloc(ctypes.c_size_t(size)))
    return torch.frombuffer(memory, dtype=dtype)[offset:].view(shape).fill_(1)
for rows, n, offset in ((3, 5, 0), (3, 5, 1), (2, 1021, 3), (1, 9001, 1)):
    z, zr = exact(rows, n, offset=offset), exact(rows, n)
    target = exact(rows, dtype=torch.long).copy_(torch.tensor([0, n - 1, n + 5])[:rows])
    shaping = exact(n), exact(rows), 5.0, 1.5
    passes.head_stats(z, zr, target, *shaping, True, True, True, exact(10, rows, dtype=torch.double))
    passes.head_js(z, zr, *shaping, True, exact(2, rows), exact(rows), exact(2, rows, dtype=torch.double))
    passes.head_grad(z, zr, target, *shaping, True, exact(10, rows), None)
    double = exact(rows, dtype=torch.double), exact(rows), exact(rows, dtype=torch.double)
    passes.head_exp(z, target, *shaping, True, True, exact(rows), *double)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = exact(rows, n, dtype=dtype, offset=offset)
        passes.logprob_rows(x, target, exact(rows), -100, exact(5, rows))
        passes.logprob_rows_backward(x, target, exact(rows), -100, exact(6, rows), exact(rows, n, dtype=dtype))
print("ended")
"""
    done = cuda_host.run_sanitized("cuda_rows_on_host.cpp", code)
    assert "ended" in done.stdout, done.stderr[-4000:]


WHOLE = {
    "bf16": {"dtype": BF16, "rows": 20, "vocabulary": 777, "width": 40},
    "every field": {"grads": DISTRIBUTION_FIELDS, "rows": 33, "vocabulary": 301, "width": 24},
    "softcap, bias, trained": {"softcap": 9.0, "bias": True, "train": True, "temperature": "per row", "rows": 20,
                               "vocabulary": 301, "width": 24, "grads": ("logprob", "kl")},
    "lora, saved logits": {"lora": True, "train": True, "save": "logits", "rows": 20, "vocabulary": 301, "width": 24},
}  # fmt: skip


@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_linear_logprob_on_the_cuda_row_passes_follows_the_definition(passes, monkeypatch, options):
    monkeypatch.setattr(head, "row_passes", lambda device: passes)
    monkeypatch.setattr(head, "BLOCK_COLUMNS", 128)
    as_exact_as_plain(**options)


@pytest.mark.parametrize("save", ["grad_vector", "recompute"])
def test_a_target_outside_the_vocabulary_is_nan_in_its_row_alone(passes, monkeypatch, save):
    monkeypatch.setattr(head, "row_passes", lambda device: passes)
    monkeypatch.setattr(checks, "checks_values", lambda tensor: False)  # as on a GPU, where the host reads no values
    hidden, weight = torch.randn(5, 16), torch.randn(60, 16, requires_grad=save == "recompute")
    target = torch.tensor([3, 60, -1, 59, 10**12])
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target, entropy=True, grad_fields=("logprob",), save=save)
    (out.logprob[0] + out.logprob[3]).backward()
    assert out.logprob.isnan().tolist() == [False, True, True, False, True]
    assert out.lse.isfinite().all()
    assert out.entropy.isfinite().all()
    good = hidden[[0, 3]].double().requires_grad_()
    naive.linear_logprob(good, weight.detach().double(), target[[0, 3]]).logprob.sum().backward()
    close(x.grad[[0, 3]], good.grad, 1e-5, 1e-6)
    assert (x.grad[[1, 2, 4]] == 0).all()


@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 86.0, 100.0, 300.0])
@pytest.mark.parametrize("columns", [1, 1000])
@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
def test_rivals_far_above_the_target_do_not_overflow(passes, monkeypatch, gap, columns, late):
    monkeypatch.setattr(head, "row_passes", lambda device: passes)
    monkeypatch.setattr(head, "BLOCK_COLUMNS", 1024)
    z = torch.randn(1, 2500)
    z[0, (slice(-columns, None) if late else slice(0, columns))] += gap
    hidden, weight = logits_head(z)
    found = []
    for function, dtype in ((linear_logprob, torch.float32), (naive.linear_logprob, F64)):
        x = hidden.to(dtype).detach().clone().requires_grad_()
        out = function(x, weight.to(dtype), torch.tensor([1250]), entropy=True, grad_fields=("logprob",))
        out.logprob.sum().backward()
        found.append((out.logprob.detach(), out.entropy.detach(), x.grad))
    for (value, truth), rel in zip(zip(*found), (5e-7, 5e-6, 2e-5)):
        close(value, truth, rel, 5e-7 * gap)
