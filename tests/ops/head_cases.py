"""Inputs for linear_logprob and logprob, the memory-bounded float64 oracle, and the error rule the tests share.

The rule: against float64, at most 2x (values) or 3x (gradients) the error of the plain PyTorch formula on the same
input, or 2e-7 (1 + |value|); and ||out - ref|| / ||ref|| below a bound a dtype, unless the plain formula misses it too.
The plain formula's largest error over a few rows is a small sample. So several seeds are pooled to 64 rows (16 where
the vocabulary is large), and the formula is evaluated in several orders of summation, which differ in rounding alone.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlhf_kernels.ops.logprob import linear_logprob, naive
from rlhf_kernels.ops.logprob.outputs import SAMPLED, sampled_estimator

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ALL_DIVERGENCES = ("kl", "rkl", "js", "k1", "k2", "k3")
DISTRIBUTION_FIELDS = ("logprob", "lse", "entropy", "kl", "rkl", "js")
EVERY_FIELD = (*DISTRIBUTION_FIELDS, "k1", "k2", "k3")
# Arguments' values, of which the test matrices try every pair.
OPTIONS: dict[str, tuple] = {
    "temperature": (1.0, 0.625, "per row"),
    "softcap": (None, 20.0),
    "logit_scale": (1.0, 0.75),
    "ignored": ((), (0, 3, 5)),
    "grads": (("logprob",), DISTRIBUTION_FIELDS, EVERY_FIELD, ("k3", "entropy"), ("kl", "js")),
    "upstream": ("signed", "first zero", "first absent"),
    "train": (False, True),
    "save": ("auto", "recompute", "grad_vector", "logits"),
    "bias": (False, True),
    "lora": (False, True),
    "own_reference": (False, True),
}
NORM_BOUND = {F32: 1e-5, BF16: 1e-2, F16: 2e-3}
POOLED_ROWS = 64
ORDERS = 3  # of summation, beside the first, for the plain formula's values
ORACLE_LOGITS = 1 << 22  # logits [rows, V] the float64 oracle holds at a time: 32 MiB a tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty holds NaN: what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Case:
    """Inputs of one comparison; `run` evaluates a function on them in a dtype and backpropagates random gradients.

    kl: about the KL wanted (default: by `noise`); p_y: about the target's probability (default: random targets);
    rivals: (gap, slice): the logits of those columns lie higher by gap; targets lie elsewhere.
    grads: fields that carry gradient; upstream: "signed", or "first zero", "all zero", "first absent".
    """

    def __init__(self, dtype=F32, rows=33, width=67, vocabulary=5003, *, grads=("logprob",), upstream="signed",
                 train=False, save="auto", bias=False, softcap=None, temperature=1.0, logit_scale=1.0, lora=False,
                 own_reference=False, noise=0.1, kl=None, p_y=None, sharpness=3.0, ignored=(3,), shift=0.0,
                 rivals=None, seed=0):  # fmt: skip
        with torch.device("cpu"):  # the same numbers on every device
            self._draw(dtype, rows, width, vocabulary, grads, upstream, bias, temperature, lora, own_reference, noise,
                       kl, p_y, sharpness, ignored, shift, rivals, seed)  # fmt: skip
        self.options = {"softcap": softcap, "logit_scale": logit_scale, "entropy": True, "divergence": ALL_DIVERGENCES,
                        "grad_fields": grads}  # fmt: skip
        self.train, self.save = train, save
        device = torch.get_default_device()
        for name in ("hidden", "weight", "reference", "ref_weight", "target", "bias", "temperature"):
            if isinstance(x := getattr(self, name), torch.Tensor):
                setattr(self, name, x.to(device))
        self.lora = None if self.lora is None else tuple(x.to(device) for x in self.lora)
        self.upstream = {name: x.to(device) for name, x in self.upstream.items()}

    def _draw(self, dtype, rows, width, vocabulary, grads, upstream, bias, temperature, lora, own_reference, noise, kl,
              p_y, sharpness, ignored, shift, rivals, seed) -> None:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        hidden, weight = draw(rows, width) * sharpness, draw(vocabulary, width) / width**0.5
        self.target = torch.randint(vocabulary, (rows,), generator=g)
        if rivals is not None:
            gap, columns = rivals
            hidden[:, 1], weight[:, 1] = 1, 0
            weight[columns, 1] = gap
            self.target = torch.tensor(sorted({*range(vocabulary)} - {*range(vocabulary)[columns]}))[
                torch.randint(vocabulary - len(range(vocabulary)[columns]), (rows,), generator=g)
            ]
        if p_y is not None:
            hidden = with_target_probability(hidden, weight, self.target, p_y)
        if kl is None:
            reference = hidden.to(dtype).float() + noise * draw(rows, width)
        else:  # one coordinate differs, so that small steps survive half precision: KL is about step^2 / 2
            hidden[:, 0] = 0
            reference = hidden.clone()
            reference[:, 0] = (2 * kl * width) ** 0.5 * (1 + 0.1 * draw(rows))
        self.hidden, self.weight, self.reference = hidden.to(dtype), weight.to(dtype), reference.to(dtype)
        self.ref_weight = (self.weight.float() + 0.01 * draw(vocabulary, width)).to(dtype) if own_reference else None
        for row in range(rows) if ignored == "all" else ignored:
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
        self.temperature = temperature
        self.upstream = {name: draw(rows) for name in grads}
        for name in grads if upstream == "all zero" else grads[:1] if upstream == "first zero" else ():
            self.upstream[name].zero_()
        if upstream == "first absent":
            del self.upstream[grads[0]]

    def in_another_order(self, seed: int) -> "Case":
        """The same case with the coordinates of the hidden states permuted, and nothing to differentiate."""
        other, width = copy.copy(self), self.hidden.shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed), device="cpu")
        order = order.to(self.hidden.device)
        for name in ("hidden", "weight", "reference", "ref_weight"):
            setattr(other, name, None if getattr(self, name) is None else getattr(self, name)[:, order])
        other.lora = None if self.lora is None else (self.lora[0][:, :, order], *self.lora[1:])
        other.upstream = {}
        return other

    def run(self, function: Callable, cast: Callable, at_once: int | None = None) -> tuple[dict, dict]:
        """The fields and the gradients by name; `at_once` rows at a time, their gradients accumulated."""
        leaf = lambda x, grad: cast(x).detach().clone().requires_grad_(grad)  # noqa: E731
        leaves = {"hidden": leaf(self.hidden, True), "weight": leaf(self.weight, self.train)}
        if self.bias is not None:
            leaves["bias"] = leaf(self.bias, self.train)
        if self.lora is not None:
            leaves["lora_a"], leaves["lora_b"] = leaf(self.lora[0], self.train), leaf(self.lora[1], self.train)
        options = {**self.options, **({"save": self.save} if function is linear_logprob else {})}
        options["bias"] = leaves.get("bias")
        options["ref_weight"] = None if self.ref_weight is None else cast(self.ref_weight)
        rows, parts = len(self.target), []
        step = at_once or max(1, rows)
        for start in range(0, max(1, rows), step):
            part = slice(start, start + step)
            if self.lora is not None:
                options["lora"] = (leaves["lora_a"], leaves["lora_b"], self.lora[2][part], self.lora[3])
            heat = self.temperature[part] if isinstance(self.temperature, torch.Tensor) else self.temperature
            out = function(
                leaves["hidden"][part], leaves["weight"], self.target[part], temperature=heat,
                ref_hidden=cast(self.reference[part]), **options,
            )  # fmt: skip
            if self.upstream:
                sum((getattr(out, name) * g[part]).sum() for name, g in self.upstream.items()).backward()
            parts.append([field.detach() for field in out])
        fields = {name: torch.cat(values) for name, values in zip(out._fields, zip(*parts))}
        return fields, {name: x.grad for name, x in leaves.items() if x.grad is not None}


def with_target_probability(hidden, weight, target, p: float):
    """hidden moved along its target's weight row until softmax gives the target probability p (1: all but 1e-15)."""
    odds = 35.0 if p == 1 else float(torch.tensor(p, dtype=torch.float64).logit())
    direction = weight[target]
    direction = direction / direction.square().sum(1, keepdim=True)
    low, high = torch.full((len(target),), -300.0), torch.full((len(target),), 300.0)
    for _ in range(24):
        middle = (low + high) / 2
        z = (hidden + middle[:, None] * direction) @ weight.t()
        own = z.gather(1, target[:, None])
        found = (own - z.scatter(1, target[:, None], float("-inf")).logsumexp(1, keepdim=True)).squeeze(1)
        low, high = torch.where(found < odds, middle, low), torch.where(found < odds, high, middle)
    return hidden + high[:, None] * direction


def as_exact_as_plain(**options: Any) -> None:
    """Asserts the error rule for linear_logprob on Case(**options), pooled over seeds where there are few rows."""
    rows, first = options.get("rows", 33), options.get("seed", 0)
    pooled_rows = POOLED_ROWS if options.get("vocabulary", 0) <= 5003 else POOLED_ROWS // 4
    seeds = range(first, first + (1 if rows == 0 else max(1, -(-pooled_rows // rows))))
    pooled: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for seed in seeds:
        case = Case(**{**options, "seed": seed})
        at_once = max(1, ORACLE_LOGITS // case.weight.shape[0])
        with poisoned_memory():
            out, grads = case.run(linear_logprob, lambda x: x)
        exact, exact_grads = case.run(naive.linear_logprob, lambda x: x.double(), at_once)
        plain, plain_grads = case.run(naive.linear_logprob, lambda x: x, at_once)
        plains = [plain, *(case.in_another_order(i).run(naive.linear_logprob, lambda x: x, at_once)[0]
                           for i in range(ORDERS if rows else 0))]  # fmt: skip
        for name, truth in exact.items():
            assert out[name].dtype == F32
            assert out[name].shape == truth.shape
            assert out[name].isfinite().all(), name
            if name in SAMPLED:  # functions of two fields that the rule holds for
                same = sampled_estimator(name, out["logprob"].double(), out["ref_logprob"].double())
                size = 1 + out["logprob"].abs() + out["ref_logprob"].abs() + same.abs()
                slope = 1 + out["k1"].double().abs() + out["k1"].double().neg().exp() * (name == "k3")
                assert ((out[name] - same).abs() <= 2e-7 * size * slope).all(), name
                continue
            error, allowed = (out[name] - truth).abs(), torch.stack([(p[name] - truth).abs() for p in plains])
            floor = 2e-7 * (1 + truth.abs())
            pooled.setdefault(name, []).append((error, allowed.amax(0), truth, floor))
        assert grads.keys() == exact_grads.keys()
        for name, truth in exact_grads.items():
            assert grads[name].isfinite().all(), name
            error, allowed = (grads[name].double() - truth).abs(), plain_grads[name].double() - truth
            error = torch.where(error <= 2e-7 * (1 + truth.abs()), 0, error)
            gradients.setdefault(name, []).append(torch.stack([x.norm() for x in (error, allowed, truth)]))
    bound = NORM_BOUND[options.get("dtype", F32)]
    for name, parts in pooled.items() if rows else ():
        error, allowed, truth, floor = (torch.cat(x) for x in zip(*parts))
        worst = (error - torch.maximum(2 * allowed.max(), floor)).max()
        assert worst <= 0, (name, error.max().item(), allowed.max().item())
        error = torch.where(error <= floor, 0, error)
        assert error.norm() <= max(bound * truth.norm(), 2 * allowed.norm()), name  # fp32 cannot keep a small KL
    for name, parts in gradients.items():
        error, allowed, truth = torch.stack(parts).norm(dim=0)
        # 4e-6: the op keeps the ratio of the two normalisers in fp32 for its gradients
        assert error <= max(3 * allowed, 4e-6 * truth), (name, error / truth, allowed / truth)
        assert error <= max(bound * truth, 3 * allowed) + 1e-12, (name, error / truth)


def pairwise(
    factors: Mapping[str, Sequence], possible: Callable[[dict], bool] = lambda row: True
) -> list[dict[str, Any]]:
    """Rows of one value a factor such that every possible pair of two factors' values occurs; the same each time."""
    names, chance = list(factors), random.Random(0)
    sizes = [len(factors[name]) for name in names]

    def pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    def values(row: Sequence[int]) -> dict[str, Any]:
        return {name: factors[name][i] for name, i in zip(names, row)}

    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i, j in itertools.product(range(sizes[a]), range(sizes[b]))
    }
    rows = []
    while missing:
        best, gain = None, 0
        a, i, b, j = min(missing)
        for _ in range(200):
            row = [chance.randrange(size) for size in sizes]
            row[a], row[b] = i, j
            if possible(values(row)) and (new := len(pairs(row) & missing)) > gain:
                best, gain = row, new
        missing.discard((a, i, b, j))  # a pair that the constraints forbid
        if best is not None:
            missing -= pairs(best)
            rows.append(values(best))
    return rows


def identify(row: Mapping[str, Any]) -> str:
    """A readable test id of a row."""
    show = lambda v: str(v).removeprefix("torch.") if not isinstance(v, tuple) else "+".join(map(str, v))  # noqa: E731
    return " ".join(f"{name}={show(value) or 'none'}" for name, value in row.items())


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def logits_head(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden, weight whose logits are the rows of z exactly (one-hot hidden states)."""
    return torch.eye(len(z), device=z.device), z.t().contiguous()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers on the default device, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(
        torch.get_default_device()
    )
