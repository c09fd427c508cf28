"""linear_logprob against its float64 definition: values, gradients, extremes, memory, determinism, errors."""

import itertools
import math
import multiprocessing
import os
import resource
import tempfile

import pytest
import torch

from rlhf_kernels.ops.logprob import head, linear_logprob, naive, native, op

ALL_DIVERGENCES = ("kl", "rkl", "js", "k1", "k2", "k3")
DISTRIBUTION_FIELDS = ("logprob", "lse", "entropy", "kl", "rkl", "js")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case:
    """Inputs of one comparison; `run` evaluates a function on them in a dtype and backpropagates random gradients."""

    def __init__(self, dtype=F32, rows=33, width=67, vocabulary=5003, *, grads=("logprob",), train=False, save="auto",
                 bias=False, softcap=None, temperature=1.0, logit_scale=1.0, lora=False, own_reference=False,
                 noise=0.1, sharpness=3.0, ignored=(3,), shift=0.0, zero_grads=False, seed=0):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.hidden = (draw(rows, width) * sharpness).to(dtype)
        self.weight = (draw(vocabulary, width) / width**0.5).to(dtype)
        self.reference = (self.hidden.float() + noise * draw(rows, width)).to(dtype)
        self.ref_weight = (self.weight.float() + 0.01 * draw(vocabulary, width)).to(dtype) if own_reference else None
        self.target = torch.randint(vocabulary, (rows,), generator=g)
        for row in ignored:
            if row < rows:
                self.target[row] = -100
        self.bias = draw(vocabulary) * 0.3 + shift if bias or shift else None
        self.lora = None
        if lora:
            index = torch.randint(-1, 2, (rows,), generator=g)
            a, b = draw(2, 4, width) / 8, draw(2, vocabulary, 4) / 4
            self.lora = (a, b, index, torch.tensor([0.5, 2.0]))
        if temperature == "per row":
            temperature = torch.rand(rows, generator=g) + 0.5
        self.options = {"softcap": softcap, "temperature": temperature, "logit_scale": logit_scale, "entropy": True,
                        "divergence": ALL_DIVERGENCES, "grad_fields": grads}  # fmt: skip
        self.upstream = {name: draw(rows) * (0 if zero_grads else 1) for name in grads}
        self.train, self.save = train, save

    def run(self, function, cast):
        leaf = lambda x, grad: cast(x).detach().clone().requires_grad_(grad)  # noqa: E731
        hidden, weight = leaf(self.hidden, True), leaf(self.weight, self.train)
        options, watched = dict(self.options), {"hidden": hidden}
        if self.bias is not None:
            options["bias"] = watched["bias"] = leaf(self.bias, self.train)
        if self.lora is not None:
            a, b, index, scaling = self.lora
            watched["lora_a"], watched["lora_b"] = leaf(a, self.train), leaf(b, self.train)
            options["lora"] = (watched["lora_a"], watched["lora_b"], index, scaling)
        if self.ref_weight is not None:
            options["ref_weight"] = cast(self.ref_weight)
        if function is linear_logprob:
            options["save"] = self.save
        out = function(hidden, weight, self.target, ref_hidden=cast(self.reference), **options)
        sum((getattr(out, name) * g).sum() for name, g in self.upstream.items()).backward()
        watched["weight"] = weight
        return out, {name: x.grad for name, x in watched.items() if x.requires_grad}


def assert_as_exact_as_plain(case: Case) -> None:
    """The error rule: against float64, at most 2x (values) or 3x (gradients) the plain formula's error.

    With few rows the plain formula's largest error is a small sample (fp32 logits near 40 are rounded by 2e-6): 4x.
    """
    times = 2 if len(case.target) >= 16 else 4
    out, grads = case.run(linear_logprob, lambda x: x)
    exact, exact_grads = case.run(naive.linear_logprob, lambda x: x.double())
    plain, plain_grads = case.run(naive.linear_logprob, lambda x: x)
    unit = 2e-7 * (1 + exact.logprob.abs().max() + exact.ref_logprob.abs().max())
    for name in out._fields:
        value, truth, other = (getattr(o, name).double() for o in (out, exact, plain))
        assert getattr(out, name).dtype == F32
        error, allowed = (value - truth).abs(), (other - truth).abs().max()
        floor = 2e-7 * (1 + truth.abs())
        if name in ("k1", "k2", "k3"):  # functions of two logprobs: their error, propagated
            k1 = exact.k1.abs()
            floor = floor + unit * {"k1": 1, "k2": k1, "k3": 1 + exact.k1.neg().exp()}[name]
        assert torch.isfinite(value).all(), name
        assert (error <= torch.maximum(times * allowed, floor)).all(), (name, error.max().item(), allowed.item())
    bound = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}[case.hidden.dtype]
    assert grads.keys() == exact_grads.keys()
    for name, value in grads.items():
        truth, other = exact_grads[name], plain_grads[name].double()
        error, allowed = (value.double() - truth).norm(), (other - truth).norm()
        assert error <= max(3 * allowed, 1e-6 * truth.norm()), (name, error / truth.norm(), allowed / truth.norm())
        assert error <= max(bound * truth.norm(), 2 * allowed) + 1e-12, name  # a small KL's: no fp32 formula keeps 1e-5


QUICK = {
    "plain": {},
    "bf16": {"dtype": BF16},
    "fp16": {"dtype": F16},
    "one row": {"rows": 1, "ignored": ()},
    "tiny vocabulary": {"vocabulary": 123, "rows": 7},
    "softcap": {"softcap": 15.0, "dtype": BF16},
    "bias and temperature": {"bias": True, "temperature": 0.7, "logit_scale": 1.3},
    "per-row temperature, own reference": {"temperature": "per row", "own_reference": True, "dtype": BF16},
    "all-negative logits": {"shift": -40.0},
    "lora": {"lora": True, "dtype": BF16},
    "lora trained": {"lora": True, "train": True, "bias": True},
    "trained head": {"train": True, "softcap": 10.0, "bias": True, "dtype": BF16},
    "saved logits": {"train": True, "save": "logits", "temperature": 0.8, "softcap": 9.0, "grads": DISTRIBUTION_FIELDS},
    "every field": {"grads": (*DISTRIBUTION_FIELDS, "k1"), "lora": True, "train": True, "bias": True, "dtype": BF16},
    "every field as vectors": {"grads": DISTRIBUTION_FIELDS, "save": "grad_vector", "softcap": 9.0},
    "logprob recomputed": {"save": "recompute", "lora": True},
    "far reference": {"noise": 4.0, "grads": ("kl", "rkl", "js")},
    "near reference": {"noise": 1e-3, "grads": ("kl", "rkl", "js")},
    "zero upstream": {"zero_grads": True, "grads": ("logprob", "kl")},
    **{f"only {name}": {"grads": (name,), "seed": i} for i, name in enumerate((*DISTRIBUTION_FIELDS, "k1", "k2"))},
}


@pytest.mark.parametrize("options", QUICK.values(), ids=QUICK.keys())
def test_values_and_gradients_follow_the_definition(options):
    assert_as_exact_as_plain(Case(**options))


@pytest.mark.parametrize("options", [QUICK[k] for k in ("softcap", "lora trained", "every field", "far reference")])
def test_the_pytorch_row_passes_agree_with_the_definition(options, monkeypatch):
    monkeypatch.setattr(native, "AVAILABLE", False)
    assert_as_exact_as_plain(Case(**options))


WIDE = [
    {"vocabulary": v, "rows": r, "width": h, "dtype": d, "softcap": c, "temperature": t, "train": w, "bias": w}
    for i, (v, r, h, d, c, t, w) in enumerate(
        itertools.product(
            (123, 5003, 32000), (1, 7, 128), (63, 130), (F32, BF16), (None, 20.0), (0.6, "per row"), (False, True)
        )
    )
    if i % 11 == 0
] + [{"vocabulary": v, "rows": 7, "width": 65, "dtype": BF16, "lora": True} for v in (50257, 128256, 151936)]


@pytest.mark.slow
@pytest.mark.parametrize("options", WIDE, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_the_wide_matrix(options):
    assert_as_exact_as_plain(Case(grads=DISTRIBUTION_FIELDS, **options))


def logits_head(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden, weight whose logits are the rows of z exactly (one-hot hidden states)."""
    return torch.eye(len(z)), z.t().contiguous()


@pytest.mark.parametrize("columns", [1, 1000])
@pytest.mark.parametrize("gap", [40.0, 59.0, 61.0, 86.0, 100.0, 300.0])
@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
def test_rivals_far_above_the_target_do_not_overflow(gap, columns, late):
    vocabulary = 9000
    z = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1))
    z[0, (slice(-columns, None) if late else slice(0, columns))] += gap
    hidden, weight = logits_head(z)
    target = torch.tensor([4500])
    out = {}
    for name, function, cast in (("ours", linear_logprob, F32), ("exact", naive.linear_logprob, torch.float64)):
        for fields in (("logprob",), ("entropy",)):
            x = hidden.to(cast).detach().clone().requires_grad_()
            o = function(x, weight.to(cast), target, entropy=True, grad_fields=fields)
            (o.logprob.sum() if fields == ("logprob",) else o.entropy.sum()).backward()
            out[name, fields[0]] = (o.logprob.item(), o.entropy.item(), x.grad.double())
    for field in ("logprob", "entropy"):
        ours, exact = out["ours", field], out["exact", field]
        assert ours[0] == pytest.approx(exact[0], rel=5e-7)
        assert ours[1] == pytest.approx(exact[1], rel=5e-6, abs=1e-12)
        assert torch.allclose(ours[2], exact[2], rtol=2e-5, atol=5e-7 * gap)


@pytest.mark.parametrize("place", [0, 4500, 8999])
@pytest.mark.parametrize("gap", [14.0, 24.0, 40.0, 100.0])
def test_a_sure_target_keeps_the_digits_of_its_logprob_entropy_and_gradient(gap, place):
    z = torch.randn(1, 9000, generator=torch.Generator().manual_seed(2))
    z[0, place] = gap
    hidden, weight = logits_head(z)
    x = hidden.clone().requires_grad_()
    out = linear_logprob(x, weight, torch.tensor([place]), entropy=True)
    out.logprob.sum().backward()
    exact = hidden.double().requires_grad_()
    truth = naive.linear_logprob(exact, weight.double(), torch.tensor([place]), entropy=True)
    others = torch.cat([z[0, :place], z[0, place + 1 :]]).double()
    logprob = -(others.logsumexp(0) - gap).exp().log1p().item()
    assert out.logprob.item() == pytest.approx(logprob, rel=3e-6)
    assert out.entropy.item() == pytest.approx(truth.entropy.item(), rel=1e-5, abs=1e-14)
    p = (others - gap).exp() / (others - gap).exp().sum()
    gradient = -math.expm1(logprob) * (gap - (p * others).sum().item())
    assert x.grad.item() == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-2, 1e-3, 3e-4])
@pytest.mark.parametrize("field", ["kl", "rkl", "js"])
def test_small_divergences_keep_their_digits(field, noise):
    g = torch.Generator().manual_seed(3)
    z = torch.randn(16, 9001, generator=g) * 3
    step = (noise * torch.randn(16, 9001, generator=g) * 2**20).round() / 2**20  # zr - z stays exact
    z = (z * 2**16).round() / 2**16
    both = torch.cat([z, z + step])
    hidden, weight = logits_head(both)
    target = torch.zeros(16, dtype=torch.long)
    out = linear_logprob(hidden[:16], weight, target, ref_hidden=hidden[16:], divergence=(field,))
    truth = naive.linear_logprob(
        hidden[:16].double(), weight.double(), target, ref_hidden=hidden[16:].double(), divergence=(field,)
    )
    value, exact = getattr(out, field).double(), getattr(truth, field)
    assert ((value - exact).abs() / exact).median() < 2e-4
    assert (value >= 0).all()


def test_divergences_of_equal_models_are_zero():
    case = Case(noise=0.0)
    out = linear_logprob(case.hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES)
    for name in ALL_DIVERGENCES:
        assert (getattr(out, name) == 0).all(), name


@pytest.mark.parametrize("gap", [50.0, 100.0, 200.0])
def test_models_that_live_on_different_tokens(gap):
    z = torch.zeros(2, 300)
    z[0, 5], z[1, 200] = gap, gap
    hidden, weight = logits_head(z)
    kw = {"ref_hidden": hidden[1:], "divergence": ("kl", "rkl", "js"), "entropy": True}
    out = linear_logprob(hidden[:1], weight, torch.tensor([7]), **kw)
    kw["ref_hidden"] = kw["ref_hidden"].double()
    truth = naive.linear_logprob(hidden[:1].double(), weight.double(), torch.tensor([7]), **kw)
    for name in ("kl", "rkl", "js", "logprob", "ref_logprob", "entropy"):
        assert getattr(out, name).item() == pytest.approx(getattr(truth, name).item(), rel=2e-6, abs=1e-12), name


def test_ignored_rows_are_zero_everywhere_even_under_nan():
    case = Case(ignored=(0, 5, 32), grads=("logprob", "kl"))
    case.hidden[5] = float("nan")
    hidden = case.hidden.clone().requires_grad_()
    out = linear_logprob(
        hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES, entropy=True,
        grad_fields=("logprob", "kl"),
    )  # fmt: skip
    (out.logprob + out.kl).backward(torch.where(case.target == -100, float("nan"), 1.0))
    ignored = case.target == -100
    for name in out._fields:
        assert (getattr(out, name)[ignored] == 0).all(), name
        assert torch.isfinite(getattr(out, name)).all(), name
    assert (hidden.grad[ignored] == 0).all()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("rows", [0, 6], ids=["no rows", "all ignored"])
@pytest.mark.parametrize("save", ["auto", "grad_vector", "recompute", "logits"])
def test_no_row_to_work_on(rows, save):
    hidden = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=save in ("recompute", "logits"))
    target = torch.full((rows,), -100)
    out = linear_logprob(
        hidden, weight, target, ref_hidden=hidden, divergence=ALL_DIVERGENCES, entropy=True, save=save,
        grad_fields=("logprob", "entropy", "js"),
    )  # fmt: skip
    (out.logprob + out.entropy + out.js).sum().backward()
    assert all(field.shape == (rows,) and not field.any() for field in out)
    assert not hidden.grad.any()


def test_leading_dimensions_strides_and_int32_targets_make_no_difference():
    x, w = torch.randn(2, 3, 5, 16), torch.randn(50, 32)[:, ::2]
    target = torch.randint(50, (2, 3, 5))
    flat = linear_logprob(x.reshape(30, 16), w.contiguous(), target.reshape(30), entropy=True)
    strided = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    shaped = linear_logprob(strided, w, target.to(torch.int32), entropy=True)
    assert shaped.logprob.shape == (2, 3, 5)
    assert torch.equal(flat.logprob, shaped.logprob.reshape(30))
    assert torch.equal(flat.entropy, shaped.entropy.reshape(30))


@pytest.mark.parametrize("where", ["policy", "reference", "weight"])
def test_nan_passes_through_no_field(where):
    torch.manual_seed(0)
    hidden, ref, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(40, 16)
    {"policy": hidden, "reference": ref, "weight": weight}[where][1, 2] = float("nan")
    fields = ("kl", "rkl", "js")
    out = linear_logprob(hidden, weight, torch.tensor([0, 5, 9]), entropy=True, ref_hidden=ref, divergence=fields)
    expected = [True] * 3 if where == "weight" else [False, True, False]
    own = () if where == "reference" else ("logprob", "entropy")
    for field in (*fields, *own):
        assert getattr(out, field).isnan().tolist() == expected, field


def test_masked_tokens_and_nan():
    x, w = torch.randn(3, 16), torch.randn(5000, 16)
    bias = torch.zeros(5000)
    bias[100:4900] = float("-inf")
    keep = torch.cat([torch.arange(100), torch.arange(4900, 5000)])
    out = linear_logprob(x, w, torch.tensor([0, 1, 2]), bias=bias, entropy=True)
    small = linear_logprob(x, w[keep], torch.tensor([0, 1, 2]), entropy=True)
    assert torch.allclose(out.logprob, small.logprob, atol=1e-6)
    assert torch.allclose(out.entropy, small.entropy, atol=1e-6)
    x[1] = float("nan")
    out = linear_logprob(x, w, torch.tensor([0, 1, 2]), entropy=True)
    assert out.logprob.isnan().tolist() == out.entropy.isnan().tolist() == [False, True, False]


def test_fields_outside_grad_fields_are_detached():
    case = Case()
    hidden = case.hidden.requires_grad_()
    out = linear_logprob(
        hidden, case.weight, case.target, ref_hidden=case.reference, divergence=ALL_DIVERGENCES, entropy=True,
        grad_fields=("k3",),
    )  # fmt: skip
    assert [name for name in out._fields if getattr(out, name).requires_grad] == ["k3"]
    free = linear_logprob(hidden, case.weight, case.target, entropy=True, grad_fields=None)
    assert all(field.requires_grad for field in (free.entropy, free.lse, free.logprob))
    assert linear_logprob(hidden, case.weight, case.target).entropy is None


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


def op_arguments(save: str, grads: str, train: bool = False) -> tuple:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=train)
    target = torch.tensor([0, 3, -100, 19, 7])
    bias, reference = torch.randn(20, requires_grad=train), torch.randn(5, 8)
    a, b = torch.randn(2, 3, 8, requires_grad=train), torch.randn(2, 20, 3, requires_grad=train)
    index, scaling = torch.tensor([0, 1, -1, 0, 1]), torch.ones(2)
    return (
        hidden, weight, target, bias, torch.rand(5) + 0.5, reference, None, a, b, index, scaling, 1.0, 5.0, 1.2, -100,
        "logprob,lse,entropy,ref_logprob,kl,rkl,js", grads, save, -1, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("save", "grads", "train"),
    [
        ("none", "", False),
        ("grad_vector", "logprob", False),
        ("grad_vector", "logprob,js", False),
        ("recompute", "logprob,entropy,kl", True),
        ("logits", "logprob,rkl", True),
    ],
)
def test_opcheck(save, grads, train):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks += ["test_aot_dispatch_dynamic"] if save != "none" else []
    torch.library.opcheck(op.forward, op_arguments(save, grads, train), test_utils=checks)


@pytest.mark.parametrize("train", [False, True])
def test_torch_compile_in_one_graph(train):
    def loss(hidden, weight, reference, target):
        out = linear_logprob(
            hidden, weight, target, ref_hidden=reference, entropy=True, divergence=("kl", "k3"), temperature=0.7,
            grad_fields=("logprob", "k3", "entropy"),
        )  # fmt: skip
        return (out.logprob + 0.1 * out.k3 - 0.01 * out.entropy).sum() + out.kl.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9):
        x = [torch.randn(rows, 12, requires_grad=True), torch.randn(30, 12, requires_grad=train), torch.randn(rows, 12)]
        y = torch.randint(30, (rows,))
        eager = loss(*x, y)
        wanted = torch.autograd.grad(eager, x[: 1 + train])
        result = compiled(*x, y)
        found = torch.autograd.grad(result, x[: 1 + train])
        assert torch.allclose(eager, result)
        for a, b in zip(wanted, found):
            assert torch.allclose(a, b, atol=1e-6)


GOOD = {"hidden": torch.randn(4, 8), "weight": torch.randn(10, 8), "target": torch.arange(4)}
BAD = {
    "target too large": ({"target": torch.tensor([0, 1, 2, 10])}, IndexError, "target holds 10"),
    "target negative": ({"target": torch.tensor([0, 1, 2, -1])}, IndexError, "target holds -1"),
    "target dtype": ({"target": torch.zeros(4)}, TypeError, "target has dtype"),
    "target shape": ({"target": torch.arange(3)}, ValueError, "target has shape"),
    "weight shape": ({"weight": torch.randn(10, 9)}, ValueError, "weight has shape"),
    "weight dtype": ({"weight": torch.randn(10, 8).double()}, TypeError, "weight has dtype"),
    "bias shape": ({"bias": torch.randn(9)}, ValueError, "bias has shape"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
    "temperature in a row": ({"temperature": torch.tensor([1.0, 1, 0, 1])}, ValueError, "temperature holds 0.0"),
    "temperature shape": ({"temperature": torch.ones(3)}, ValueError, "temperature has shape"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    "logit_scale": ({"logit_scale": 0}, ValueError, "logit_scale is 0"),
    "divergence": ({"divergence": ("tv",), "ref_hidden": torch.randn(4, 8)}, ValueError, "divergence holds"),
    "no reference": ({"divergence": ("kl",)}, ValueError, "ref_hidden is None"),
    "reference shape": ({"ref_hidden": torch.randn(3, 8)}, ValueError, "ref_hidden has shape"),
    "grad_fields": ({"grad_fields": ("entropy",)}, ValueError, "grad_fields holds"),
    "save": ({"save": "all"}, ValueError, "save is 'all'"),
    "valid_rows": ({"valid_rows": 5}, ValueError, "valid_rows is 5"),
    "valid_rows wrong": ({"valid_rows": 3}, ValueError, "valid_rows is 3"),
    "grad_vector": ({"save": "grad_vector", "weight": torch.randn(10, 8, requires_grad=True)}, ValueError, "save="),
    "lora shape": ({"lora": (torch.randn(2, 8), torch.randn(9, 2), None, 1.0)}, ValueError, "lora B has shape"),
    "lora index": ({"lora": (torch.randn(2, 8), torch.randn(10, 2), 1, 1.0)}, IndexError, "adapter_index is 1"),
    "lora indices": (
        {"lora": (torch.randn(2, 8), torch.randn(10, 2), torch.tensor([0, 0, 3, 0]), 1.0)}, IndexError, "adapter_index",
    ),
}  # fmt: skip


BAD_ANYWHERE = {
    "hidden is a list": ({"hidden": [1.0]}, TypeError, "hidden is a list"),
    "weight is None": ({"weight": None}, TypeError, "weight is a NoneType"),
    "temperature of text": ({"temperature": "1"}, TypeError, "temperature is '1'"),
    "softcap of text": ({"softcap": "1"}, TypeError, "softcap is '1'"),
    "logit_scale nan": ({"logit_scale": math.nan}, ValueError, "logit_scale is nan"),
}


@pytest.mark.parametrize(
    ("options", "error", "message"), (BAD | BAD_ANYWHERE).values(), ids=(BAD | BAD_ANYWHERE).keys()
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        linear_logprob(**{**GOOD, **options})


VALUES = {name: case for name, case in BAD.items() if name != "weight dtype"}


@pytest.mark.parametrize(("options", "error", "message"), VALUES.values(), ids=VALUES.keys())
def test_bad_input_is_named_in_float64_too(options, error, message):
    def wide(x):
        if isinstance(x, tuple):
            return tuple(wide(y) for y in x)
        floating = isinstance(x, torch.Tensor) and x.dtype == torch.float32
        return x.detach().double().requires_grad_(x.requires_grad) if floating else x

    with pytest.raises(error, match=message):
        linear_logprob(**{k: wide(v) for k, v in {**GOOD, **options}.items()})


def test_the_reference_is_a_constant_even_where_every_field_carries_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    target = torch.arange(4)
    out = linear_logprob(hidden, weight, target, ref_hidden=hidden, divergence=("kl",), grad_fields=None)
    assert out.kl.requires_grad
    assert not out.ref_logprob.requires_grad


def test_autocast_changes_nothing():
    hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    lora = (torch.randn(3, 16), torch.randn(50, 3), None, 0.5)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = linear_logprob(hidden, weight, torch.arange(6), lora=lora, entropy=True, grad_fields=None)
            found.append((out.logprob, *torch.autograd.grad((out.logprob + out.entropy).sum(), (hidden, weight))))
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found))


@pytest.mark.parametrize("save", ["grad_vector", "recompute"])
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(save):
    hidden = torch.randn(4, 8, requires_grad=True)
    out = linear_logprob(hidden, torch.randn(10, 8), torch.arange(4), save=save)
    (grad,) = torch.autograd.grad(out.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), hidden)


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
