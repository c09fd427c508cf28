"""Random calls of lora_linear and lora_linears, the float64 oracle, and the error rule for their outputs and gradients.

A case is drawn whole from its number: shapes, dtypes, strides, how the index, the adapters and the scaling are given,
what needs a gradient. The rule is head_cases': against float64 at most 2x (values) or 3x (gradients) the error of the
plain PyTorch formula on the same input in the same dtype, or 2e-7 (1 + |value|), and a bound on the norm of the error.
A tensor of few numbers is a small sample of the formula's error, so draws are pooled until there are POOLED of each.
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from ops.head_cases import BF16, F16, F32, NORM_BOUND, poisoned_memory

from rlhf_kernels.ops.lora import Routing, build_routing, lora_linear, lora_linears, naive

F64 = torch.float64
POOLED = 96  # numbers of each tensor that the rule is applied to, where a case has fewer
DRAWS = 24  # at most, of one case
ORDERS = 3  # of summation, beside the first, for the plain formula's values


class Case:
    """One call. Options not given are drawn from `number`; `draw` changes the numbers in the tensors only."""

    def __init__(self, number: int, draw: int = 0, **options: Any) -> None:
        self.chance = random.Random(number)
        pick = self.chance.choice
        drawn = {
            "dtype": pick((F32, F32, BF16, BF16, F16, F64)),
            "rows": pick((0, 1, 1, 2, 3, 5, *[self.chance.randint(1, 80)] * 8, self.chance.randint(81, 300))),
            "k": self.chance.randint(1, 200),
            "projections": pick((1, 1, 1, 2, 3)),
            "adapters": pick((1, 2, 3, 4, self.chance.randint(5, 12), 0)),
            "route": pick(("runs", "runs", "sorted", "random", "random", "bypass", "one")),
            "given": pick(("index", "index", "int32", "routing", "from_runs", "prefix", "prefix routing")),
            "stack": pick(("3-D", "list", "list", "ranks", "ranks tensor", "strided")),
            "adapter_dtype": pick((None, None, F32)),
            "scaling": pick(("float", "int", "list", "tensor", "0-D")),
            "strides": pick(("plain", "plain", "sliced", "transposed")),
            "grad_rows": pick((None, None, None, "some", "none")),
            "learns": pick(("all", "all", "lora", "x and lora", "some")),
            "upstream": pick(("all", "all", "absent", "expanded")),
            "bias": pick((True, False)),
        }
        assert not options.keys() - drawn.keys()
        drawn.update(options)
        for name, value in drawn.items():
            setattr(self, name, value)
        if self.stack in ("3-D", "ranks", "ranks tensor", "strided") and self.adapters == 0:
            self.stack = "list"
        self.prefix = 1
        if self.given.startswith("prefix"):
            self.prefix = pick((2, 3, 5))
            self.rows -= self.rows % self.prefix
        self.widths = [self.chance.randint(1, 200) for _ in range(self.projections)]
        self._draw_routing()
        self._draw_tensors(torch.Generator().manual_seed(1000 * number + draw))

    def _draw_routing(self) -> None:
        n, entries, chance = self.adapters, self.rows // self.prefix, self.chance
        if self.route == "bypass" or n == 0:
            index = [-1] * entries
        elif self.route == "one":
            index = [chance.randrange(n)] * entries
        elif self.route == "random":
            index = [chance.randrange(-1, n) for _ in range(entries)]
        else:
            roles = [chance.randrange(-1, n) for _ in range(chance.randint(1, 4))]
            index = [role for role in roles for _ in range(-(-entries // len(roles)))][:entries]
            index = sorted(index) if self.route == "sorted" else index
        self.short = torch.tensor(index, dtype=torch.int32 if self.given == "int32" else torch.int64)
        self.index = self.short.long().repeat_interleave(self.prefix)
        self.live = {None: None, "some": chance.randint(0, self.rows), "none": 0}[self.grad_rows]

    def _draw_tensors(self, g: torch.Generator) -> None:
        n, k, count, chance = self.adapters, self.k, self.projections, self.chance

        def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=g) * size

        self.x = draw(self.rows, k).to(self.dtype)
        self.weights = [draw(width, k, size=k**-0.5).to(self.dtype) for width in self.widths]
        self.biases = [draw(width).to(self.dtype) if self.bias else None for width in self.widths]
        equal = self.stack != "list"
        self.padded = chance.choice((1, 2, 4, 8, 16, 33))
        ranks = [[chance.choice((0, 1, 3, 8, 16, 40)) for _ in range(n)] for _ in range(count)]
        if equal:
            real = [self.padded if not self.stack.startswith("ranks") else chance.randint(0, self.padded)] * n
            real = [chance.randint(0, self.padded) for _ in range(n)] if self.stack.startswith("ranks") else real
            ranks = [real] * count
        self.ranks = ranks
        kind = self.adapter_dtype or self.dtype
        self.a = [[draw(r, k, size=k**-0.5).to(kind) for r in some] for some in ranks]
        self.b = [
            [draw(width, r, size=max(r, 1) ** -0.5).to(kind) for r in some] for width, some in zip(self.widths, ranks)
        ]
        values = [chance.choice((0.25, 0.5, 1.0, 1.7, -2.0)) for _ in range(n)]
        if self.scaling in ("float", "int", "0-D"):
            values = [2.0 if self.scaling == "int" else 0.7] * n
        self.scales = torch.tensor(values, dtype=F32).tolist()
        self.grads = [draw(self.rows, width).to(self.dtype) for width in self.widths]
        if self.upstream == "expanded":
            self.grads = [grad[:1].expand_as(grad) if self.rows else grad for grad in self.grads]
        self.absent = {chance.randrange(count)} if self.upstream == "absent" and count > 1 else set()

    def learned(self) -> dict[str, bool]:
        """Which kinds of tensors need gradients."""
        names = ("x", "weights", "biases", "a", "b")
        if self.learns == "some":
            return {name: random.Random(f"{self.rows} {self.k} {name}").random() < 0.5 for name in names}
        chosen = {"all": names, "lora": ("a", "b"), "x and lora": ("x", "a", "b")}[self.learns]
        return {name: name in chosen for name in names}

    # ---- the definition ----------------------------------------------------------------------------------------------

    def definition(self, cast: Callable = lambda t: t, order: int | None = None) -> tuple[list, dict]:
        """ys and the gradients by name, by `naive`, the tensors cast; order: the features permuted, values only."""
        learned = self.learned() if order is None else dict.fromkeys(self.learned(), False)
        features = slice(None)
        if order is not None:
            features = torch.randperm(self.k, generator=torch.Generator().manual_seed(order))

        def leaf(t: torch.Tensor | None, name: str, inner: bool = True) -> torch.Tensor | None:
            if t is None:
                return None
            t = cast(t)[:, features] if inner and order is not None else cast(t)
            t = self._strided(t) if name in ("x", "weights") else t.clone()
            return t.detach().requires_grad_(learned[name])

        leaves = {
            "x": [leaf(self.x, "x")],
            "weights": [leaf(w, "weights") for w in self.weights],
            "biases": [leaf(b, "biases", False) for b in self.biases],
            "a": [leaf(a, "a") for some in self.a for a in some],
            "b": [leaf(b, "b", False) for some in self.b for b in some],
        }
        n = self.adapters
        ys = [
            naive.lora_linear(
                leaves["x"][0], leaves["weights"][p], leaves["biases"][p], leaves["a"][p * n : p * n + n],
                leaves["b"][p * n : p * n + n], self.index, self.scales, self.live,
            )
            for p in range(self.projections)
        ]  # fmt: skip
        self._backpropagate(ys, [cast(grad) for grad in self.grads])
        return [y.detach() for y in ys], self._gradients(leaves)

    def _backpropagate(self, ys: list, grads: list) -> None:
        used = [p for p in range(self.projections) if p not in self.absent and ys[p].requires_grad]
        if used:
            torch.autograd.backward([ys[p] for p in used], [grads[p] for p in used])

    def _gradients(self, leaves: dict[str, list]) -> dict[str, torch.Tensor]:
        return {
            f"{name}[{i}]": torch.zeros_like(t) if t.grad is None else t.grad
            for name, tensors in leaves.items()
            for i, t in enumerate(tensors)
            if t is not None and t.requires_grad
        }

    # ---- the op ------------------------------------------------------------------------------------------------------

    def call(self, wrap: Callable = lambda f: f) -> tuple[list, dict]:
        """ys and the gradients by name, by the op, its arguments given as the case has them."""
        learned = self.learned()
        x = self._strided(self.x).requires_grad_(learned["x"])
        weights = [self._strided(w).requires_grad_(learned["weights"]) for w in self.weights]
        biases = [None if b is None else b.clone().requires_grad_(learned["biases"]) for b in self.biases]
        a_given, a_leaves = self._stacked(self.a, 0, learned["a"])
        b_given, b_leaves = self._stacked(self.b, 1, learned["b"])
        options: dict[str, Any] = {"scaling": self._scaling()}
        if self.stack.startswith("ranks"):
            options["ranks"] = torch.tensor(self.ranks[0]) if self.stack == "ranks tensor" else self.ranks[0]
        if self.live is not None:
            options["grad_rows"] = self.live
        if self.given == "from_runs":
            runs, start = [], 0
            adapters, counts = torch.unique_consecutive(self.index, return_counts=True)
            for e, many in zip(adapters.tolist(), counts.tolist()):
                runs.append((start, start + many, e))
                start += many
            options["routing"] = Routing.from_runs(runs, self.adapters)
        elif self.given in ("routing", "prefix routing"):
            options["routing"] = build_routing(self.short, self.adapters)
        else:
            options["adapter_index"] = self.short
        shaped = x if self.prefix == 1 else x.view(-1, self.prefix, self.k)
        if self.projections == 1 and self.k % 3:
            ys = [wrap(lora_linear)(shaped, weights[0], a_given[0], b_given[0], bias=biases[0], **options)]
        else:
            ys = list(wrap(lora_linears)(shaped, weights, a_given, b_given, biases=biases, **options))
        assert all(y.shape == (*shaped.shape[:-1], width) for y, width in zip(ys, self.widths))
        ys = [y.reshape(self.rows, y.shape[-1]) for y in ys]
        self._backpropagate(ys, self.grads)
        grads = self._gradients({"x": [x], "weights": weights, "biases": biases})
        for name, leaves, dim in (("a", a_leaves, 0), ("b", b_leaves, 1)):
            for i, leaf in enumerate(leaves if learned[name] else ()):
                stacked = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
                if self.stack == "list":
                    grads[f"{name}[{i}]"] = stacked
                    continue
                for e in range(self.adapters):
                    real, rest = stacked[e].split([self.ranks[i][e], self.padded - self.ranks[i][e]], dim)
                    assert not rest.any(), "the padding got a gradient"
                    grads[f"{name}[{i * self.adapters + e}]"] = real
        return [y.detach() for y in ys], grads

    def _strided(self, t: torch.Tensor) -> torch.Tensor:
        if self.strides == "transposed":
            return t.t().contiguous().t()
        return torch.cat([t, t], 1)[:, : t.shape[1]] if self.strides == "sliced" else t.clone()

    def _stacked(self, matrices: list[list[torch.Tensor]], dim: int, learns: bool) -> tuple[list, list]:
        """The adapters of each projection as the call gets them, and the leaves."""
        if self.stack == "list":
            given = [[t.clone().requires_grad_(learns) for t in some] for some in matrices]
            return given, [t for some in given for t in some]
        stacks = []
        for some in matrices:
            shape = list(some[0].shape)
            shape[dim] = self.padded
            stack = torch.full((len(some), *shape), float("nan"), dtype=some[0].dtype)
            for slot, t in zip(stack, some):
                slot.narrow(dim, 0, t.shape[dim]).copy_(t)
            if self.stack == "strided":
                stack = stack.transpose(0, 1).contiguous().transpose(0, 1)
            stacks.append(stack.requires_grad_(learns))
        return stacks, stacks

    def _scaling(self) -> Any:
        as_given = {"int": 2, "float": self.scales[0] if self.scales else 1.0, "list": list(self.scales)}
        as_given["0-D"] = torch.tensor(as_given["float"])
        return as_given[self.scaling] if self.scaling in as_given else torch.tensor(self.scales)


def as_exact_as_plain(number: int, wrap: Callable = lambda f: f, **options: Any) -> None:
    """Asserts the error rule on the case of this number."""
    pooled: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for draw in range(DRAWS):
        case = Case(number, draw, **options)
        with poisoned_memory() if case.dtype != F64 else nullcontext():
            ys, grads = case.call(wrap)
        exact, exact_grads = case.definition(lambda t: t.double())
        plain, plain_grads = case.definition()
        plains = [plain, *(case.definition(order=order)[0] for order in range(ORDERS))]
        assert grads.keys() == exact_grads.keys()
        for p, (y, truth) in enumerate(zip(ys, exact)):
            allowed = torch.stack([(some[p].double() - truth).abs() for some in plains]).amax(0)
            pooled.setdefault(f"y[{p}]", []).append((y, truth, allowed))
        for name, truth in exact_grads.items():
            assert grads[name].shape == truth.shape, name
            assert grads[name].dtype == plain_grads[name].dtype, name
            pooled.setdefault(name, []).append((grads[name], truth, (plain_grads[name].double() - truth).abs()))
        if min((sum(t[0].numel() for t in parts) or POOLED for parts in pooled.values()), default=POOLED) >= POOLED:
            break
    for name, parts in pooled.items():
        got, truth, allowed = (torch.cat([t.reshape(-1) for t in some]) for some in zip(*parts))
        check(f"case {number}: {name}", got, truth, allowed, case.dtype, values=name.startswith("y"))


def check(
    what: str, got: torch.Tensor, truth: torch.Tensor, allowed: torch.Tensor, dtype: torch.dtype, values: bool
) -> None:
    """The error rule. allowed: the plain formula's error."""
    if not got.numel():
        return
    assert got.isfinite().all(), what
    error, factor = (got.double() - truth).abs(), 2 if values else 3
    floor = 2e-7 * (1 + truth.abs()) if dtype != F64 else 1e-13 * (1 + truth.abs())
    if values:
        # base and sum each rounded to 16 bits once, which the plain formula's largest error may miss by luck
        rounded = (1.0 if dtype in (BF16, F16) else 0.5) * torch.finfo(dtype).eps * truth.abs()
        worst = (error - torch.maximum(factor * allowed.max(), torch.maximum(floor, rounded))).max()
        assert worst <= 0, (what, error.max().item(), allowed.max().item())
    error = torch.where(error <= floor, 0, error)
    bound = max(NORM_BOUND.get(dtype, 1e-13) * truth.norm(), factor * allowed.norm())
    assert error.norm() <= bound, (what, (error.norm() / truth.norm()).item(), (allowed.norm() / truth.norm()).item())
    if not values:
        assert error.norm() <= max(3 * allowed.norm(), 2e-6 * truth.norm()), (what, error.norm(), allowed.norm())
