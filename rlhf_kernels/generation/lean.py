"""Which modules of a model run lean while generation steps run on the CPU, and that they then compute the same.

A module has a replacement where its class is built as expected and where, once for every model, the replacement's
output on a small packed row equals the module's own within rounding. Replacements stand in the modules' instance
dictionaries only while `applied` is open, serve only the thread that opened it, and leave modules with hooks alone.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_kernels.generation.arena import ALIGNMENT, Arena, layer_shapes
from rlhf_kernels.generation.lean_parts import (
    ATTENTION,
    ATTENTION_READS,
    GATED,
    HEAD_NORMS,
    LAYER,
    LeanAttention,
    LeanLayer,
    LeanLinear,
    LeanMLP,
    LeanNorm,
    Part,
)
from rlhf_kernels.generation.lean_stack import LeanStack, stack_of
from rlhf_kernels.integrations.transformers import SlicedRows
from rlhf_kernels.ops import registry
from rlhf_kernels.ops.lora.tiles import DTYPES

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of |got - want| / |want|; a wrong replacement is off by ~1
LENGTHS = (7, 1, 5)  # tokens of the sequences on which replacements are proved
SLICE_TOKENS = 8
Step = Callable[[Tensor, Tensor, SlicedRows, Tensor], Tensor]  # Forward.logits

_plans: "WeakKeyDictionary[nn.Module, LeanModules]" = WeakKeyDictionary()


def lean_modules(lm: nn.Module) -> "LeanModules":
    """The replacements of a model, which all its generators share."""
    if lm not in _plans:
        _plans[lm] = LeanModules()
    return _plans[lm]


class LeanModules:
    """The replacements of one model's modules; none until they are proved."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._stack: LeanStack | None = None  # the whole model
        self._proved: torch.dtype | None = None
        self._owner = 0  # the thread whose calls the replacements serve

    @contextmanager
    def applied(self, lm: Any, step: Step) -> Iterator[None]:
        """Replacements serve this thread inside. `step` runs the model (see Forward.logits), for the proof."""
        if self._owner or not _suits(lm):
            yield
            return
        self._owner = get_ident()
        replaced: list[Part] = []
        try:
            self._prove(lm, step)
            whole = self._stack if all(map(_untouched, lm.modules())) else None
            for part in self._parts:
                if all(_untouched(module) for module in (part.module, *part.inner)):
                    part.module.__dict__["forward"] = self._served(part)
                    replaced.append(part)
            if whole is not None:
                whole.begin()
                lm.__dict__["forward"] = self._served(whole)
                replaced.append(whole)
            yield
        finally:
            for part in replaced:
                del part.module.__dict__["forward"]
            self._owner = 0

    def _served(self, part: Part) -> Callable[..., Any]:
        original = type(part.module).forward.__get__(part.module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            mine = get_ident() == self._owner and part.serves(*args, **kwargs)
            return part(*args, **kwargs) if mine else original(*args, **kwargs)

        return forward

    def _prove(self, lm: Any, step: Step) -> None:
        """Runs the model's own modules once and their candidates beside them; keeps those that agree."""
        dtype = lm.dtype
        known = self._parts if self._stack is None else [*self._parts, self._stack]
        if self._proved == dtype and all(part.current() for part in known):
            return
        probe = Probe(lm)
        trials = [Trial(part, probe, TOLERANCE[dtype]) for part in candidates(lm)]
        try:
            for trial in trials:
                trial.part.module.__dict__["forward"] = trial
            probe.run(step)
        finally:
            for trial in trials:
                trial.part.module.__dict__.pop("forward", None)
        passed: list[Part] = []
        for trial in trials:  # inner ones first: a sum hides what is wrong with a small term
            if trial.passed and all(part in passed for part in trial.part.parts):
                passed.append(trial.part)
        within = {id(inner) for part in passed for inner in part.inner}
        self._parts = [part for part in passed if id(part.module) not in within]
        self._stack = self._proved_stack(lm, step, passed)
        self._proved = dtype

    def _proved_stack(self, lm: Any, step: Step, passed: list[Part]) -> LeanStack | None:
        """The model as one op, where its logits, keys and values are the model's own."""
        stack = stack_of(lm, {part.module: part for part in passed})
        if stack is None or not all(map(_untouched, lm.modules())):
            return None
        own, mine = Probe(lm), Probe(lm)
        want = own.run(step)
        stack.begin()
        lm.__dict__["forward"] = stack
        try:
            got = mine.run(step)
        finally:
            del lm.__dict__["forward"]
        pairs = [(got, want), *zip(mine.written(), own.written())]
        return stack if all(relative_error(a, b) <= TOLERANCE[lm.dtype] for a, b in pairs) else None


class Trial:
    """Stands in a module's place once: the module's own forward runs, and the candidate is compared with it."""

    def __init__(self, part: Part, probe: "Probe", tolerance: float) -> None:
        self.part, self.probe, self.tolerance = part, probe, tolerance
        self.calls, self.passed = 0, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = type(self.part.module).forward(self.part.module, *args, **kwargs)
        self.calls += 1
        want = result[0] if isinstance(result, tuple) else result
        errors = [(self._error(v, want, args, kwargs), i) for i, v in enumerate(self.part.variants())]
        error, best = min(errors)
        self.passed = self.calls == 1 and error <= self.tolerance
        if self.passed:
            self.part.choose(self.part.variants()[best], self.probe)
        return result

    def _error(self, variant: Any, want: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        try:
            self.part.choose(variant, self.probe)
            got = self.part(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError):
            return float("inf")
        got = got[0] if isinstance(got, tuple) else got
        if got.shape != want.shape or got.dtype != want.dtype:
            return float("inf")
        error = relative_error(got, want)
        return error if error == error else float("inf")


class Probe(SlicedRows):
    """A few short sequences in an arena of their own, which notes what each layer attends with, and compares."""

    def __init__(self, lm: Any) -> None:
        shapes, count = layer_shapes(lm.config), len(LENGTHS)
        nbytes = sum(heads * (k + v) for heads, k, v in shapes) * SLICE_TOKENS * lm.dtype.itemsize * count
        arena = Arena(shapes, nbytes + 2 * len(shapes) * ALIGNMENT, SLICE_TOKENS, lm.dtype, lm.device)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        self.positions = torch.cat([torch.arange(n) for n in LENGTHS])
        slots = torch.cat([torch.arange(n) + i * SLICE_TOKENS for i, n in enumerate(LENGTHS)])
        borders = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
        super().__init__(arena, slots, torch.arange(count, dtype=torch.int32)[:, None], lengths, borders)
        vocabulary = lm.get_input_embeddings().weight.shape[0]
        self.tokens = torch.arange(1, len(slots) + 1) * 7919 % vocabulary
        self.options: dict[int, dict[str, Any]] = {}
        self._rotated: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.options[layer], self._rotated[layer] = options, (q, k)
        return super().attend(layer, q, k, v, **options)

    def rotate_and_attend(self, layer: int, q: Tensor, *rest: Any, **options: Any) -> Tensor:
        """ValueError where q and k are not rotated as the module's own: with small weights outputs hide it."""
        out = super().rotate_and_attend(layer, q, *rest, **options)
        places = self.slots // SLICE_TOKENS, slice(None), self.slots % SLICE_TOKENS
        for mine, own in zip((q, self.arena.keys[layer][places]), self._rotated[layer]):
            if not relative_error(mine, own) <= TOLERANCE[q.dtype]:
                raise ValueError("q or k is rotated in another way")
        return out

    def run(self, step: Step) -> Tensor:
        return step(self.tokens, self.positions, self, self.cu_q[1:].long() - 1)

    def written(self) -> list[Tensor]:
        """Every layer's keys and values of its tokens."""
        index, offset = self.slots // SLICE_TOKENS, self.slots % SLICE_TOKENS
        return [plane[index, :, offset] for plane in (*self.arena.keys, *self.arena.values)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).float().norm() / want.float().norm()).item()


def candidates(lm: nn.Module) -> list[Part]:
    """A replacement for every module that is built as one expects."""
    found: dict[nn.Module, Part] = {}
    for module in reversed(list(lm.modules())):  # the inner ones first
        part = _candidate(module, found) if _untouched(module) else None
        if part is not None and all(_untouched(inner) for inner in part.inner):
            found[module] = part
    return list(found.values())


def _candidate(module: Any, inner: dict[nn.Module, Part]) -> Part | None:
    """`inner`: the replacements of the modules in it."""
    if type(module) is nn.Linear:
        return LeanLinear(module)
    children, own = set(module._modules), set(module._parameters) | set(module._buffers)
    reads = set(getattr(inspect.unwrap(type(module).forward), "__code__", _nothing.__code__).co_names)
    if not children and own == {"weight"} and "RMSNorm" in type(module).__name__:
        return _norm(module)
    if children == GATED and not own and reads == GATED:
        return LeanMLP(module)
    if children - HEAD_NORMS == ATTENTION and not own and "apply_rotary_pos_emb" in reads:
        norms = [_norm(module._modules[name]) for name in sorted(children & HEAD_NORMS, reverse=True)]
        alike = all(norm is not None and norm.size == module.head_dim for norm in norms)
        if alike and len(norms) in (0, 2) and reads <= ATTENTION_READS | ATTENTION | HEAD_NORMS:
            return LeanAttention(module, [norm for norm in norms if norm is not None])
    if children == reads == LAYER and not own:
        parts = {name: inner.get(child) for name, child in module._modules.items()}
        kinds = [type(parts[name]) for name in sorted(LAYER)]
        if kinds == [LeanNorm, LeanMLP, LeanNorm, LeanAttention]:
            return LeanLayer(module, parts)
    return None


def _norm(module: Any) -> LeanNorm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return LeanNorm(module, eps) if isinstance(eps, float) and _untouched(module) else None


def _nothing() -> None:
    pass


def _untouched(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in module.__dict__


def _suits(lm: Any) -> bool:
    """Whether steps of this model can be lean: the compiled ops serve it, and nothing rewrites or watches its calls."""
    hooks = nn.modules.module
    watched = hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks
    return (
        lm.device.type == "cpu"
        and lm.dtype in TOLERANCE
        and lm.dtype in DTYPES
        and registry.asked() in (None, "native")
        and not watched
        and not torch.is_autocast_enabled("cpu")
    )
