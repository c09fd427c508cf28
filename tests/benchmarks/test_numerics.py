"""The numerics report: its truths are right, its inputs hit what they aim at, and ours meets the promised errors."""

import math

import pytest
import torch

from benchmarks import numerics, numerics_inputs, numerics_tables
from benchmarks.case import OURS

WIDTH, VOCAB, PER_VALUE = 256, 3001, 4


@pytest.fixture(scope="module")
def report() -> numerics.Report:
    chosen = {name: numerics.CONTESTANTS[name] for name in (OURS, "eager, bf16 logits", "eager, fp32 inputs")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "CONTESTANTS", chosen)
        return numerics.report(WIDTH, VOCAB, PER_VALUE)


def test_rows_hit_the_values_they_are_aimed_at(report):
    logprob, _, _, kl = report.sections
    for p, truth in zip(numerics_inputs.P_Y, logprob.truths):
        assert truth == pytest.approx(math.log(p), rel=0.3)
    for wanted, truth in zip(numerics_inputs.KL, kl.truths):
        assert 0.3 * wanted < truth < 3 * wanted


def test_ours_keeps_its_digits_where_log_softmax_loses_them(report):
    logprob, gradient, entropy, kl = report.sections
    assert max(logprob.errors[OURS]) < 1e-4  # the last column is logprob = -1e-6
    assert max(gradient.errors[OURS]) < 3e-3  # rounding to bf16 is 1.7e-3 of that
    assert max(entropy.errors[OURS]) < 1e-4  # up to a gap of 20
    assert kl.errors[OURS][numerics_inputs.KL.index(3e-5)] < 1e-3
    rounded = "eager, bf16 logits"
    assert logprob.errors[rounded][-1] > 10 * logprob.errors[OURS][-1]
    assert kl.errors[rounded][numerics_inputs.KL.index(3e-5)] > 0.1


def test_the_truths_agree_with_plain_float64_where_that_has_digits():
    torch.manual_seed(1)
    z, z_ref, target = torch.randn(5, 50).double(), torch.randn(5, 50).double(), torch.randint(50, (5,))
    lp, lq = z.log_softmax(-1), z_ref.log_softmax(-1)
    torch.testing.assert_close(numerics._exact_logprob(z, target), lp.gather(1, target[:, None]).squeeze(1))
    torch.testing.assert_close(numerics._exact_entropy(z), -(lp.exp() * lp).sum(-1))
    torch.testing.assert_close(numerics._exact_kl(z, z_ref), (lp.exp() * (lp - lq)).sum(-1))


def test_the_gradients_truth_is_autograds(report):
    torch.manual_seed(2)
    weight = numerics_inputs.make_weight(200, 32)
    rows = numerics_inputs.by_probability(weight, 2)
    hidden = rows.hidden.double().requires_grad_()
    logprob = (hidden @ weight.double().t()).log_softmax(-1).gather(1, rows.target[:, None])
    (expected,) = torch.autograd.grad(logprob.sum(), hidden)
    section = numerics._gradient(weight, rows, {})
    norms = [expected.norm(dim=-1)[rows.label == c].quantile(0.5).item() for c in range(len(section.columns))]
    assert section.truths == pytest.approx(norms, rel=1e-6)


def test_a_contestant_without_an_output_is_named_below_the_table_and_nan_is_shown():
    section = numerics.Section("t", "q", ["a"], [1.0], {OURS: [math.nan], "other": None}, {"gone": "not installed"})
    text = numerics_tables.markdown(numerics.Report("shape", [section]))
    assert "| **nan** |" in text
    assert "No such output: other; gone: not installed." in text


def test_numbers_are_short():
    assert [numerics.number(x) for x in (3.64e-8, 0.5, 0.9998, -20.7)] == ["3.6e-8", "0.5", "0.9998", "-21"]


def test_the_report_prints(report, capsys):
    numerics_tables.print_report(report)
    assert "exact KL to a reference" in capsys.readouterr().out
