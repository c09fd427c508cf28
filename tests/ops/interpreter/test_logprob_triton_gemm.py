"""The head's GEMM kernels (the Triton tier) against the definition in float64: values, gradients, extremes."""

import pytest
import torch
from head_cases import Case

from rlhf_kernels.ops.logprob import linear_logprob, naive, triton_sweeps, triton_tier
from rlhf_kernels.ops.logprob import state as st
from rlhf_kernels.ops.logprob.head import Head, LowRank

F32, F16, F64 = torch.float32, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def swept(monkeypatch):
    """What the tier was asked for, and whether it served. Small bounds make many chunks and groups of rows."""
    monkeypatch.setattr(triton_sweeps, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(triton_sweeps, "RECORD_BYTES", 1 << 14)
    calls = []
    whole = triton_tier.sweep

    def recorded(head, reference, kl, rkl, states, grad):
        found = whole(head, reference, kl, rkl, states, grad)
        calls.append(("states" if states else "parts", found.state is not None or found.parts is not None))
        return found

    monkeypatch.setattr(triton_tier, "sweep", recorded)
    return calls


def call(function, case, device, cast, options):
    """One call on the case's inputs without what only the blocks serve: (output, gradient of hidden or None)."""
    move = lambda x: None if x is None else cast(x).detach().clone().to(device)  # noqa: E731
    hidden = move(case.hidden).requires_grad_(options.get("grad", False))
    given = {k: v for k, v in case.options.items() if k in ("softcap", "logit_scale")}
    heat = case.temperature
    given["temperature"] = heat.to(device) if isinstance(heat, torch.Tensor) else heat
    if options.get("divergence") is not None:
        given |= {"ref_hidden": move(case.reference), "ref_weight": move(case.ref_weight)}
        given["divergence"] = options["divergence"]
    out = function(hidden, move(case.weight), case.target.to(device), bias=move(case.bias),
                   entropy=options.get("entropy", False), **given)  # fmt: skip
    if options.get("grad"):
        (out.logprob * case.upstream["logprob"].to(device)).sum().backward()
    return out, hidden.grad


def assert_as_exact_as_plain(case, device, **options):
    """The error rule: at most 2x (values; 4x with few rows) or 3x (gradients) the plain formula's error."""
    times = 2 if len(case.target) >= 16 else 4
    out, grad = call(linear_logprob, case, device, lambda x: x, options)
    exact, exact_grad = call(naive.linear_logprob, case, device, lambda x: x.double(), options)
    plain, plain_grad = call(naive.linear_logprob, case, device, lambda x: x, options)
    for name, truth in exact._asdict().items():
        if truth is None:
            continue
        error, allowed = (getattr(out, name) - truth).abs(), (getattr(plain, name) - truth).abs().max()
        assert torch.isfinite(getattr(out, name)).all(), name
        assert (error <= torch.maximum(times * allowed, 2e-7 * (1 + truth.abs()))).all(), (name, error.max(), allowed)
    if grad is not None:
        error, allowed = (grad - exact_grad).norm(), (plain_grad - exact_grad).norm()
        assert error <= max(3 * allowed, 1e-6 * exact_grad.norm()), (error, allowed)


SHAPES = {
    "one row": {"rows": 1, "width": 5, "vocabulary": 700, "ignored": ()},
    "narrow": {"rows": 7, "width": 67, "vocabulary": 123},
    "many tiles": {"rows": 33, "width": 64, "vocabulary": 1003},
    "many chunks": {"rows": 33, "width": 68, "vocabulary": 5003},
    "fp16": {"rows": 33, "width": 72, "vocabulary": 1003, "dtype": F16},
    "bias": {"bias": True, "vocabulary": 515, "temperature": 0.7, "logit_scale": 1.3},
    "softcap": {"softcap": 5.0, "vocabulary": 515, "temperature": "per row"},
    "softcap, bias, any stride": {"softcap": 5.0, "vocabulary": 300, "width": 66, "bias": True, "temperature": 0.6},
    "all-negative logits": {"shift": -40.0, "vocabulary": 515},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logprob_and_its_gradient_follow_the_definition(device, swept, shape):
    assert_as_exact_as_plain(Case(**shape), device, grad=True)
    assert swept == [("parts", True)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_scores_follow_the_definition(device, swept, shape):
    assert_as_exact_as_plain(Case(**shape), device, entropy=True)
    assert swept == [("states", True)]


REFERENCES = {
    "kl": ({}, ("kl",)),
    "reverse kl": ({}, ("rkl",)),
    "no divergence": ({"vocabulary": 300}, ()),
    "own weight, softcap": ({"own_reference": True, "softcap": 5.0}, ("kl",)),
    "own weight, bias": ({"own_reference": True, "bias": True, "temperature": 0.8}, ("kl",)),
    "own weight, any stride, reverse": ({"own_reference": True, "width": 67, "temperature": "per row"}, ("rkl",)),
    "far apart": ({"noise": 4.0}, ("kl",)),
    "reverse, far apart": ({"noise": 4.0}, ("rkl",)),
    "one row": ({"rows": 1, "ignored": (), "vocabulary": 123}, ("kl",)),
}


@pytest.mark.parametrize(("shape", "divergence"), REFERENCES.values(), ids=REFERENCES.keys())
def test_scores_beside_a_reference_follow_the_definition(device, swept, shape, divergence):
    case = Case(**{"rows": 17, "width": 64, "vocabulary": 515, **shape})
    assert_as_exact_as_plain(case, device, entropy=True, divergence=divergence)
    assert swept == [("states", True)]


def test_what_the_blocks_do_better_is_left_to_them(device, swept):
    case = Case(rows=7, width=8, vocabulary=123)
    assert_as_exact_as_plain(case, device, entropy=True, divergence=("kl", "rkl"))
    assert_as_exact_as_plain(case, device, entropy=True, grad=True)
    both = Case(rows=7, width=8, vocabulary=123, softcap=5.0, bias=True)
    assert_as_exact_as_plain(both, device, entropy=True, divergence=("kl",))
    assert swept == [("states", False)] * 3


def head_of(logits, target, device, reference=None):
    """A head whose logits are these [R, V], exactly: hidden picks a row of an orthogonal weight."""
    rows, vocabulary = logits.shape
    weight = torch.zeros(vocabulary, 2 * rows)
    weight[:, :rows] = logits.t()
    if reference is not None:
        weight[:, rows:] = reference.t()
    both = torch.eye(2 * rows)
    return Head(
        x=both[:rows].to(device), ref=None if reference is None else both[rows:].to(device), weight=weight.to(device),
        ref_weight=None, bias=None, target=target.to(device), temperature=torch.ones(rows, device=device), softcap=0.0,
        scale=1.0,
    )  # fmt: skip


def states(logits, target, device, reference=None, kl=True):
    found = triton_tier.sweep(
        head_of(logits, target, device, reference), reference is not None, kl, not kl, True, False
    )
    return found.state.cpu()


@pytest.mark.parametrize("late", [False, True], ids=["rivals first", "rivals last"])
@pytest.mark.parametrize("many", [1, 1000])
@pytest.mark.parametrize("gap", [40, 59, 61, 86, 100, 300])
def test_rivals_far_above_the_target_do_not_overflow(device, gap, many, late):
    logits = torch.randn(5, 1500)
    columns = slice(1500 - many, 1500) if late else slice(0, many)
    logits[:, columns] += gap
    target = torch.full((5,), 3 if late else 1490)
    shift, mass, target_z, pulled = triton_tier.sweep(
        head_of(logits, target, device), False, False, False, False, True
    ).parts
    z = logits.double()
    e = (z - shift.cpu().double()[:, None]).exp().scatter_(1, target[:, None], 0)
    rest = z.clone().scatter_(1, target[:, None], -torch.inf).logsumexp(1)
    assert torch.equal(target_z.cpu(), z.gather(1, target[:, None]).squeeze(1))
    torch.testing.assert_close(shift.cpu().double() + mass.cpu().log(), rest, rtol=1e-6, atol=1e-5)
    weight = torch.zeros(1500, 10, dtype=F64)
    weight[:, :5] = z.t()
    expected = e @ weight
    error = (pulled.cpu() - expected).norm(dim=1) / expected.norm(dim=1)
    assert torch.isfinite(pulled).all()
    assert (error < 1e-4).all()


@pytest.mark.parametrize("place", [0, 700, 1499])
@pytest.mark.parametrize("gap", [10, 20, 100])
def test_a_dominant_token_keeps_the_digits_of_the_rest(device, gap, place):
    logits = torch.randn(2, 1500)
    logits[:, place] = logits.max() + gap
    target = torch.tensor([place, (place + 1) % 1500])  # it is the target of the first row only
    found, z = states(logits, target, device), logits.double()
    rest = z.clone().scatter_(1, target[:, None], -torch.inf).logsumexp(1)
    ours = st.logprob_of(found[st.REST], found[st.TARGET])
    exact = st.logprob_of(rest, z.gather(1, target[:, None]).squeeze(1))
    torch.testing.assert_close(ours, exact, rtol=2e-6, atol=1e-30)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    others = z.clone().scatter_(1, torch.full((2, 1), place), -torch.inf).logsumexp(1) - z[:, place]
    near = log_p.exp().scatter(1, torch.full((2, 1), place), 0)
    entropy = others.exp().log1p() * log_p[:, place].exp() - (near * log_p).sum(1)  # nothing cancels in it
    torch.testing.assert_close(found[st.ENTROPY], entropy, rtol=2e-5, atol=1e-38)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("noise", "bound"), [(1e-3, 1e-3), (8e-3, 1e-4), (0.3, 1e-5)])
def test_a_small_divergence_keeps_its_digits(device, noise, bound, reverse):
    logits = torch.randn(16, 1500) * 3
    reference = logits + noise * torch.randn(16, 1500)
    found = states(logits, torch.zeros(16, dtype=torch.long), device, reference, kl=not reverse)
    p, q = logits.double().log_softmax(1), reference.double().log_softmax(1)
    p, q = (q, p) if reverse else (p, q)
    exact = (p.exp() * ((q - p).expm1() - (q - p))).sum(1)
    ours = found[st.RKL if reverse else st.KL]
    assert ((ours - exact).abs() / exact).median() < bound


def test_models_that_live_on_different_tokens(device):
    logits, reference = torch.randn(4, 900), torch.randn(4, 900)
    logits[:, 10] += 80
    reference[:, 800] += 90
    p, q = logits.double().log_softmax(1), reference.double().log_softmax(1)
    for kl, exact, row in ((True, p.exp() * (p - q), st.KL), (False, q.exp() * (q - p), st.RKL)):
        found = states(logits, torch.zeros(4, dtype=torch.long), device, reference, kl)
        torch.testing.assert_close(found[row], exact.sum(1), rtol=1e-6, atol=0)
        whole = reference.double().logsumexp(1) - logits.double().logsumexp(1)
        torch.testing.assert_close(found[st.DIFFERENCE], whole, rtol=1e-6, atol=1e-5)


def test_masked_tokens_have_no_mass_and_equal_tops_all_of_theirs(device):
    logits = torch.full((2, 700), -1e30)
    logits[:, 100:104] = 5.0
    found = states(logits, torch.tensor([101, 3]), device)
    torch.testing.assert_close(found[st.LSE], 5 + torch.tensor(4.0, dtype=F64).log().expand(2))
    torch.testing.assert_close(found[st.ENTROPY], torch.tensor(4.0, dtype=F64).log().expand(2))
    torch.testing.assert_close(found[st.REST][0], 5 + torch.tensor(3.0, dtype=F64).log())


def test_nan_reaches_its_row_and_no_other(device):
    logits, reference = torch.randn(4, 600), torch.randn(4, 600)
    bad = torch.zeros(4, 600)
    bad[1, 300] = torch.nan
    target = torch.tensor([5, 5, 300, 5])
    # one row a head: through the GEMM a NaN in W would reach every row
    for row in range(4):
        one = slice(row, row + 1)
        found = states((logits + bad)[one], target[one], device, reference[one])
        assert found[[st.LSE, st.REST, st.ENTROPY, st.KL], 0].isnan().all() == (row == 1)
        parts = triton_tier.sweep(head_of((logits + bad)[one], target[one], device), *(False,) * 4, True).parts
        assert parts.mass.isnan().any().item() == (row == 1)


def test_the_same_bits_every_time_and_in_every_batch(device):
    case = Case(rows=70, width=16, vocabulary=515, ignored=())
    whole = [call(linear_logprob, case, device, lambda x: x, {"entropy": True, "divergence": ("kl",)})[0] for _ in "ab"]
    for name in ("logprob", "entropy", "kl"):
        assert torch.equal(getattr(whole[0], name), getattr(whole[1], name))
    alone = Case(rows=70, width=16, vocabulary=515, ignored=())
    some = torch.tensor([3, 40, 69])
    alone.hidden, alone.reference, alone.target = case.hidden[some], case.reference[some], case.target[some]
    few = call(linear_logprob, alone, device, lambda x: x, {"entropy": True, "divergence": ("kl",)})[0]
    for name in ("logprob", "entropy", "kl"):
        one, other = getattr(few, name), getattr(whole[0], name)[some]
        if device.type == "cuda":
            assert torch.equal(one, other), name
        else:  # the interpreter's products are numpy's, which on some chips round by a row's place
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    grads = [call(linear_logprob, case, device, lambda x: x, {"grad": True}) for _ in "ab"]
    assert torch.equal(grads[0][1], grads[1][1])


def test_rows_that_stand_in_several_groups(device, monkeypatch):
    monkeypatch.setattr(triton_sweeps.Exponentials, "ROWS_AT_ONCE", 32)
    assert_as_exact_as_plain(Case(rows=75, width=16, vocabulary=300), device, grad=True)


def test_targets_of_another_shard_are_left_out_of_nothing(device):
    logits = torch.randn(6, 600)
    target = torch.tensor([-1, 600, 5, 10_000, -600, 599])
    found = states(logits, target, device)
    absent = torch.tensor([True, True, False, True, True, False])
    assert torch.equal(found[st.TARGET] == -torch.inf, absent)
    assert torch.equal(found[st.REST][absent], found[st.LSE][absent])
    parts = triton_tier.sweep(head_of(logits, target, device), *(False,) * 4, True).parts
    assert torch.equal(parts.target_z.cpu() == -torch.inf, absent)
    rest = parts.shift.cpu().double() + parts.mass.cpu().log()
    torch.testing.assert_close(rest, found[st.REST], rtol=1e-6, atol=1e-6)


def test_heads_the_kernels_do_not_take(device):
    head = head_of(torch.randn(3, 50), torch.zeros(3, dtype=torch.long), device)
    assert triton_tier.serve(head)
    s, a, b = (torch.zeros(shape, device=device) for shape in ((3, 1), (1, 6), (50, 1)))
    head.low_rank = [LowRank(None, s, a, b, s[0], 0)]
    assert not triton_tier.serve(head)


@pytest.mark.parametrize("rows", [1, 128, 5000, 8192, 16384])
def test_a_chunk_stays_within_its_bytes_and_keeps_the_programs_busy(rows, monkeypatch):
    monkeypatch.undo()
    tile = triton_sweeps.EXPONENTIALS["sm_90"]
    columns = triton_sweeps.chunk_columns(rows, 128256, 2, tile, 132)
    assert columns % tile.bn == 0
    assert 2 * rows * columns <= triton_sweeps.CHUNK_BYTES
    tiles = -(-rows // tile.bm) * min(columns, 128256 + tile.bn) // tile.bn
    assert tiles / (-(-tiles // 132) * 132) > 0.9
