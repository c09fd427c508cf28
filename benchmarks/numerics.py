"""Errors against float64 of log-probability, entropy, exact KL and the gradient, ours beside each peer's.

Everyone gets the same bf16 inputs; the truth is what float64 makes of those. Log-probability, entropy and KL: median
relative error over the rows of a column. Gradient of `hidden` (of the log-probability): norm of the error over the norm
of the truth, median; a gradient that comes back in bf16 is off by 1.7e-3 from that alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import numerics_inputs as inputs
from benchmarks.case import OURS, Unavailable
from benchmarks.numerics_inputs import Rows, logits64
from benchmarks.peers import HEADS, Head, eager, eager_fp32

WIDTH, VOCAB, PER_VALUE = 896, 151936, 16
CONTESTANTS: dict[str, Callable[[str], Head]] = {
    OURS: HEADS[OURS],
    "eager, bf16 logits": eager,
    "eager, fp32 inputs": eager_fp32,
    **{name: HEADS[name] for name in ("TRL chunked", "TRL selective_log_softmax")},
    **{name: HEADS[name] for name in ("Liger scaled CE", "Liger chunked loss", "CCE torch.compile")},
}


@dataclass
class Section:
    """One table: the columns' truths (medians) and each contestant's errors, None where it has no such output."""

    title: str
    quantity: str
    columns: list[str]
    truths: list[float]
    errors: dict[str, list[float] | None] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    shape: str
    sections: list[Section]


def report(width: int = WIDTH, vocab: int = VOCAB, per_value: int = PER_VALUE) -> Report:
    """Draws the inputs, computes the truths, and asks every contestant for every quantity."""
    torch.manual_seed(0)
    weight = inputs.make_weight(vocab, width)
    heads, missing = _load()
    probable = inputs.by_probability(weight, per_value)
    sections = [_logprob(weight, probable, heads), _gradient(weight, probable, heads)]
    sections.append(_entropy(weight, inputs.by_gap(weight, per_value), heads))
    sections.append(_divergence(weight, inputs.by_divergence(weight, per_value), heads))
    for section in sections:
        section.unavailable = missing
    return Report(f"{per_value} rows a column, {width} x {vocab}", sections)


def _load() -> tuple[dict[str, Head], dict[str, str]]:
    heads, missing = {}, {}
    for name, load in CONTESTANTS.items():
        try:
            heads[name] = load("cpu")
        except Unavailable as why:
            missing[name] = str(why)
    return heads, missing


def _logprob(weight: Tensor, rows: Rows, heads: dict[str, Head]) -> Section:
    z = logits64(rows.hidden, weight)
    truth = _exact_logprob(z, rows.target)
    columns = _probabilities()
    section = Section("logprob by p_y", "logprob", columns, _medians(truth, rows.label, len(columns)))
    for name, head in heads.items():
        with torch.no_grad():
            got = head.logprob(rows.hidden, weight, rows.target)
        section.errors[name] = _medians(_relative(got, truth), rows.label, len(columns))
    return section


def _gradient(weight: Tensor, rows: Rows, heads: dict[str, Head]) -> Section:
    z = logits64(rows.hidden, weight)
    p = z.softmax(-1)
    at_target = p.scatter(1, rows.target[:, None], 0.0)
    # d logprob / d z is -p, and 1 - p at the target: the sum of the others there, which does not cancel
    d_z = (-at_target).scatter(1, rows.target[:, None], at_target.sum(-1, keepdim=True))
    blocks = zip(d_z.split(inputs.ORACLE_BLOCK, dim=1), weight.split(inputs.ORACLE_BLOCK))
    truth = sum((d @ w.double() for d, w in blocks), torch.zeros_like(rows.hidden, dtype=torch.float64))
    columns = _probabilities()
    norms = truth.norm(dim=-1)
    section = Section("gradient of hidden by p_y", "its norm", columns, _medians(norms, rows.label, len(columns)))
    for name, head in heads.items():
        hidden = rows.hidden.clone().requires_grad_()
        (got,) = torch.autograd.grad(head.logprob(hidden, weight, rows.target).float().sum(), hidden)
        error = (got.double() - truth).norm(dim=-1) / norms
        section.errors[name] = _medians(error, rows.label, len(columns))
    return section


def _entropy(weight: Tensor, rows: Rows, heads: dict[str, Head]) -> Section:
    truth = _exact_entropy(logits64(rows.hidden, weight))
    columns = [f"{gap:g}" for gap in inputs.GAPS]
    title = "entropy by the gap of a likely token (not the target) above the log-mass of the others"
    section = Section(title, "entropy", columns, _medians(truth, rows.label, len(columns)))
    for name, head in heads.items():
        section.errors[name] = None
        if head.entropy is not None:
            with torch.no_grad():
                got = head.entropy(rows.hidden, weight, rows.target)[1]
            section.errors[name] = _medians(_relative(got, truth), rows.label, len(columns))
    return section


def _divergence(weight: Tensor, rows: Rows, heads: dict[str, Head]) -> Section:
    assert rows.ref_hidden is not None
    truth = _exact_kl(logits64(rows.hidden, weight), logits64(rows.ref_hidden, weight))
    columns = [number(kl) for kl in inputs.KL]
    title = "exact KL to a reference by KL"
    section = Section(title, "KL", columns, _medians(truth, rows.label, len(columns)))
    for name, head in heads.items():
        section.errors[name] = None
        if head.divergence is not None:
            with torch.no_grad():
                got = head.divergence(rows.hidden, rows.ref_hidden, weight, rows.target)[2]
            section.errors[name] = _medians(_relative(got, truth), rows.label, len(columns))
    return section


def _probabilities() -> list[str]:
    return ["1 - 1e-6" if p > 1 - 1e-5 else number(p) for p in inputs.P_Y]


def number(value: float) -> str:
    """Two digits: 0.48, 3.6e-8; more where a value just below 1 needs them."""
    if math.isnan(value):
        return "nan"
    digits = 4 if 0.99 < value < 1 else 2
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e+")


def _exact_logprob(z: Tensor, target: Tensor) -> Tensor:
    """-log(1 + sum of the others over the target), which keeps its digits at logp = -1e-6 too."""
    z_y = z.gather(1, target[:, None])
    return -torch.log1p((z - z_y).exp().scatter(1, target[:, None], 0.0).sum(-1))


def _exact_entropy(z: Tensor) -> Tensor:
    """The top token's share by log1p of the rest, so that float64 has digits to spare at any gap."""
    top = z.max(-1)
    d = z - top.values[:, None]
    rest = d.exp().scatter(1, top.indices[:, None], 0.0)
    mass = rest.sum(-1)
    return torch.log1p(mass) - (rest * d).sum(-1) / (1 + mass)


def _exact_kl(z: Tensor, z_ref: Tensor) -> Tensor:
    """sum p (r - 1 - log r) with r = q / p: every term is positive, none cancels."""
    lp, lq = z.log_softmax(-1), z_ref.log_softmax(-1)
    log_r = lq - lp
    return (lp.exp() * (torch.expm1(log_r) - log_r)).sum(-1)


def _relative(got: Tensor, truth: Tensor) -> Tensor:
    return (got.double() - truth).abs() / truth.abs()


def _medians(values: Tensor, label: Tensor, columns: int) -> list[float]:
    """Median of each column's rows; a NaN among them makes it NaN."""
    return [values[label == c].double().quantile(0.5).item() for c in range(columns)]
