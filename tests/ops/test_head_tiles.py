"""The CPU's fused tier of linear_logprob: bf16 heads on the matrix and vector units, against float64."""

import os
import subprocess
import sys

import pytest
import torch

from rlhf_kernels.ops.logprob import linear_logprob, naive, native, state, sweep

BF16 = torch.bfloat16
FIELDS = ("logprob", "lse", "entropy", "ref_logprob", "kl", "rkl", "js", "k1", "k3")
UNITS = {"avx512_bf16": 1, "amx": 2}

tiles = pytest.mark.skipif(
    not native.has_tiles(torch.zeros(1, dtype=BF16)), reason="this machine has neither AMX-BF16 nor AVX512-BF16"
)


def inputs(rows: int, width: int, vocabulary: int, seed: int = 0, noise: float = 0.1):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g) * 3
    weight = torch.randn(vocabulary, width, generator=g) / width**0.5
    reference = hidden + noise * torch.randn(rows, width, generator=g)
    return hidden.to(BF16), weight.to(BF16), reference.to(BF16), torch.randint(vocabulary, (rows,), generator=g)


def run(function, hidden, weight, target, cast, upstream, **options):
    x = cast(hidden).detach().requires_grad_()
    options = {k: cast(v) if k in ("ref_hidden", "ref_weight", "bias") else v for k, v in options.items()}
    out = function(x, cast(weight), target, **options)
    (out.logprob * upstream).sum().backward()
    return out, x.grad.double()


def in_another_order(k: int, hidden, weight, target, options):
    """The plain formula with the products summed in another order: a few rows' largest error is a small sample."""
    turned = {name: x.roll(k, 1) if name in ("ref_hidden", "ref_weight") else x for name, x in options.items()}
    return naive.linear_logprob(hidden.roll(k, 1), weight.roll(k, 1), target, **turned)


def assert_right(hidden, weight, target, **options):
    """The error rule against float64: at most twice (values) or 3 times (gradients) the plain formula's error."""
    upstream = torch.randn(len(target), generator=torch.Generator().manual_seed(5))
    out, grad = run(linear_logprob, hidden, weight, target, lambda x: x, upstream, **options)
    exact, exact_grad = run(naive.linear_logprob, hidden, weight, target, lambda x: x.double(), upstream, **options)
    plain, plain_grad = run(naive.linear_logprob, hidden, weight, target, lambda x: x, upstream, **options)
    plains = [plain, *(in_another_order(k, hidden, weight, target, options) for k in (1, hidden.shape[1] // 2))]
    unit = 2e-7 * (1 + exact.lse.abs().max())
    for name in FIELDS:
        if getattr(exact, name) is None:
            continue
        value, truth = getattr(out, name).double(), getattr(exact, name)
        allowed = 2 * max((getattr(p, name).double() - truth).abs().max() for p in plains)
        floor = 2e-7 * (1 + truth.abs()) + (unit if name in ("k1", "k3") else 0)
        error = (value - truth).abs()
        assert (error <= torch.maximum(floor, allowed)).all(), (name, error.max().item(), allowed.item())
    error, allowed = (grad - exact_grad).norm(), (plain_grad - exact_grad).norm()
    assert error <= max(3 * allowed, 1e-6 * exact_grad.norm()), (error.item(), allowed.item())
    assert error <= 1e-2 * exact_grad.norm() + 1e-12


SHAPES = [(1, 64, 5003), (7, 5, 123), (33, 63, 321), (64, 130, 320), (65, 31, 2600), (100, 96, 33), (3, 32, 1)]
HEADS = {
    "plain": {},
    "bias, temperature, scale": {"bias": True, "temperature": 0.7, "logit_scale": 1.3},
    "negative scale": {"logit_scale": -0.8, "bias": True},
    "softcap": {"softcap": 12.0, "temperature": "per row"},
    "reference with its own head": {"ref_weight": True, "temperature": "per row"},
}


@tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_values_and_gradients_at_any_shape(shape, head):
    hidden, weight, reference, target = inputs(*shape)
    options = dict(head)
    if "bias" in options:
        options["bias"] = torch.randn(shape[2], generator=torch.Generator().manual_seed(1)).to(BF16)
    if "ref_weight" in options:
        options["ref_weight"] = (weight.float() * 1.01).to(BF16)
    if options.get("temperature") == "per row":
        options["temperature"] = torch.rand(shape[0], generator=torch.Generator().manual_seed(2)) + 0.5
    every = ("kl", "rkl", "js", "k1", "k3")
    assert_right(hidden, weight, target, entropy=True, ref_hidden=reference, divergence=every, **options)


@tiles
@pytest.mark.parametrize("fields", [{}, {"entropy": True}, {"kl": True}, {"rkl": True}, {"ref": True}], ids=str)
def test_each_combination_of_sums_alone(fields):
    hidden, weight, reference, target = inputs(40, 48, 700)
    options = {"entropy": True} if "entropy" in fields else {}
    if set(fields) & {"kl", "rkl", "ref"}:
        options |= {"ref_hidden": reference, "divergence": tuple(set(fields) & {"kl", "rkl"})}
    assert_right(hidden, weight, target, **options)


@tiles
@pytest.mark.parametrize("unit", UNITS)
def test_both_units_are_right(unit):
    if (
        unit == "amx"
        and torch.ops.rlhf_kernels.bf16_isa() != UNITS["amx"]
        and not os.environ.get("RLHF_KERNELS_CPU_ISA")
    ):
        pytest.skip("this machine has no AMX-BF16")
    here = "tests/ops/test_head_tiles.py"
    script = (
        "import sys, torch, pytest; from rlhf_kernels.ops import registry; registry.native_available();"
        f"assert torch.ops.rlhf_kernels.bf16_isa() == {UNITS[unit]};"
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '{here}', '-k', 'any_shape or rivals']))"
    )
    environment = {**os.environ, "RLHF_KERNELS_CPU_ISA": unit}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_instruction_set_can_be_ruled_out():
    script = "import torch, rlhf_kernels._C; print(torch.ops.rlhf_kernels.bf16_isa())"
    environment = {**os.environ, "RLHF_KERNELS_CPU_ISA": "portable"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0"


@tiles
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 20.0}], ids=str)
def test_a_row_has_the_same_bits_alone_and_among_others_on_any_number_of_threads(options):
    hidden, weight, reference, target = inputs(1100, 40, 1500)
    options = {**options, "divergence": ("kl",)}

    def bits(rows, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x = hidden[rows].detach().requires_grad_()
            out = linear_logprob(x, weight, target[rows], ref_hidden=reference[rows], **options)
            out.logprob.sum().backward()
        finally:
            torch.set_num_threads(before)
        fields = (out.logprob, out.kl, x.grad, *((out.entropy,) if out.entropy is not None else ()))
        return [f.detach() for f in fields]

    whole = bits(slice(None), 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, bits(slice(None), 1)))
    for rows in (slice(5, 6), slice(1090, 1100), slice(31, 97)):
        for alone, among in zip(bits(rows, 2), whole):
            assert torch.equal(alone, among[rows])


@tiles
@pytest.mark.parametrize("columns", [1, 1000])
@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 86.0, 100.0, 300.0])
@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
def test_rivals_far_above_the_target_do_not_overflow(gap, columns, late):
    rows, vocabulary = 70, 4000
    z = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).to(BF16)
    z[::2, (slice(-columns, None) if late else slice(0, columns))] += gap
    hidden, weight = torch.eye(rows).to(BF16), z.t().contiguous()
    assert_right(hidden, weight, torch.full((rows,), 2000), entropy=True)


@tiles
@pytest.mark.parametrize("gap", [14.0, 24.0, 60.0, 80.0])
def test_a_sure_target_keeps_the_digits_of_its_logprob(gap):
    z = torch.randn(64, 3000, generator=torch.Generator().manual_seed(2)).to(BF16)
    z[:, 1500] = gap
    hidden, weight, target = torch.eye(64).to(BF16), z.t().contiguous(), torch.full((64,), 1500)
    out = linear_logprob(hidden, weight, target, entropy=True)
    others = torch.cat([z[:, :1500], z[:, 1501:]], 1).double()
    logprob = -(others.logsumexp(1) - gap).exp().log1p()
    truth = naive.linear_logprob(hidden.double(), weight.double(), target, entropy=True)
    assert torch.allclose(out.logprob.double(), logprob, rtol=3e-6, atol=0)
    assert torch.allclose(out.entropy.double(), truth.entropy, rtol=1e-5, atol=1e-14)


@tiles
@pytest.mark.parametrize("gap", [50.0, 100.0, 200.0])
def test_rows_whose_reference_lives_elsewhere_are_taken_by_blocks(gap, monkeypatch):
    z = torch.zeros(80, 1300, dtype=BF16)
    z[:40, 5], z[40:, 5] = gap, gap
    z[50, 5], z[50, 1200] = 0, gap
    hidden, weight = torch.eye(80).to(BF16), z.t().contiguous()
    swept, blocks = [], sweep._blocks
    monkeypatch.setattr(sweep, "_blocks", lambda head, *rest: (swept.append(head.rows), blocks(head, *rest))[1])
    options = {"divergence": ("kl", "rkl"), "entropy": True}
    target = torch.full((40,), 7)
    out = linear_logprob(hidden[:40], weight, target, ref_hidden=hidden[40:], **options)
    exact = naive.linear_logprob(
        hidden[:40].double(), weight.double(), target, ref_hidden=hidden[40:].double(), **options
    )
    assert swept == ([] if gap < 60 else [1])
    for name in ("kl", "rkl", "logprob", "ref_logprob", "entropy"):
        assert torch.allclose(getattr(out, name).double(), getattr(exact, name), rtol=2e-6, atol=1e-12), name


@tiles
@pytest.mark.parametrize("where", ["policy", "reference", "weight"])
def test_nan_ends_in_its_own_rows(where):
    hidden, weight, ref, target = inputs(70, 32, 900)
    {"policy": hidden, "reference": ref, "weight": weight}[where][37, 2] = float("nan")
    x = hidden.requires_grad_()
    out = linear_logprob(x, weight, target, entropy=True, ref_hidden=ref, divergence=("kl", "rkl", "js"))
    out.logprob.sum().backward()
    rows = torch.zeros(70, dtype=torch.bool)
    rows[37] = True
    if where == "weight":
        rows[:] = True
    own = () if where == "reference" else ("logprob", "entropy", "lse")
    for field in ("kl", "rkl", "js", *own):
        assert torch.equal(getattr(out, field).isnan(), rows), field
    if where != "reference":
        assert torch.equal(x.grad.isnan().any(1), rows)
    assert torch.isfinite(out.ref_logprob[~rows]).all()


@tiles
def test_masked_tokens_have_no_mass():
    hidden, weight, _, target = inputs(40, 32, 3000)
    target = target % 50
    bias = torch.zeros(3000, dtype=BF16)
    bias[50:2950] = float("-inf")
    keep = torch.cat([torch.arange(50), torch.arange(2950, 3000)])
    x, few = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, target, bias=bias, entropy=True)
    small = linear_logprob(few, weight[keep], target, entropy=True)
    (out.logprob.sum() + small.logprob.sum()).backward()
    assert torch.allclose(out.logprob, small.logprob, atol=1e-6)
    assert torch.allclose(out.entropy, small.entropy, atol=1e-6)
    assert torch.allclose(x.grad.float(), few.grad.float(), rtol=2e-2, atol=2e-2)


@tiles
def test_what_the_tiles_do_not_take_is_right_too():
    hidden, weight, reference, target = inputs(40, 48, 700)
    transposed = weight.t().contiguous().t()
    assert_right(hidden, transposed, target, entropy=True, ref_hidden=reference, divergence=("kl",))
    strided = torch.cat([hidden, hidden], 1)[:, ::2]
    whole = linear_logprob(strided.contiguous(), weight, target)
    assert torch.equal(linear_logprob(strided, weight, target).logprob, whole.logprob)


ROUNDINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale and bias": {"logit_scale": 1.3, "bias": True},
    "softcap": {"softcap": 20.0, "temperature": 0.6, "bias": True, "logit_scale": 0.9},
}


@tiles
@pytest.mark.parametrize("options", ROUNDINGS.values(), ids=ROUNDINGS.keys())
def test_a_logit_has_the_same_bits_in_a_tile_and_in_a_block(options, monkeypatch):
    """Gradients by recomputation take their logits from blocks, and the normalisers from the tiles."""
    hidden, weight, _, target = inputs(300, 200, 2000)
    options = dict(options)
    if "bias" in options:
        options["bias"] = torch.randn(2000, generator=torch.Generator().manual_seed(1)).to(BF16)
    found, statistics = [], sweep.statistics

    def spy(*arguments):
        result = statistics(*arguments)
        found.append(result[0])
        return result

    monkeypatch.setattr(sweep, "statistics", spy)
    linear_logprob(hidden, weight, target, entropy=True, **options)
    monkeypatch.setattr(sweep, "fused", lambda head: None)
    linear_logprob(hidden, weight, target, entropy=True, **options)
    assert torch.equal(found[0][state.TARGET], found[1][state.TARGET])


@tiles
def test_the_products_by_blocks_keep_fp32_sums():
    g = torch.Generator().manual_seed(0)
    for rows, width, columns in ((1, 32, 32), (33, 70, 131), (7, 5, 3), (100, 1000, 999)):
        x, w = torch.randn(rows, width, generator=g).to(BF16), torch.randn(columns, width, generator=g).to(BF16)
        dz = torch.randn(rows, columns, generator=g)
        rounded = dz.to(BF16).double()
        logits, total = torch.full((rows, columns), float("nan")), torch.ones(rows, width)
        outer = torch.full((columns, width), float("nan"), dtype=BF16)
        torch.ops.rlhf_kernels.bf16_logits(x, w, logits)
        torch.ops.rlhf_kernels.bf16_pull(dz, w, total)
        torch.ops.rlhf_kernels.bf16_outer(dz, x, outer)
        for value, truth, bound in (
            (logits, x.double() @ w.double().t(), 5e-7),
            (total, 1 + rounded @ w.double(), 1e-6),
            (outer, rounded.t() @ x.double(), 3e-3),
        ):
            assert (value.double() - truth).norm() <= bound * truth.norm()
