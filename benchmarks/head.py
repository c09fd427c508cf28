"""`linear_logprob` beside every peer: scoring, forward + backward with a frozen and a trained head, and exact KL.

The shapes are the heads of three real models; a CPU gets fewer rows than a GPU. Every contestant gets the same hidden
states, weight, targets and per-token upstream gradients. "GEMMs alone" is the yardstick: the library's matrix products
that the work cannot do without, into buffers that are kept from run to run, and nothing else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.case import Case, Prepare, Run, Target, Unavailable
from benchmarks.peers import HEADS, Head

Work = Literal["score", "entropy", "frozen", "trained", "kl"]

GEMMS = "GEMMs alone"
NAMES: dict[Work, str] = {
    "score": "logprob, forward only",
    "entropy": "logprob and entropy, forward only",
    "frozen": "logprob, forward + backward, frozen head",
    "trained": "logprob, forward + backward, trained head",
    "kl": "logprob, entropy and exact KL to a reference, forward only",
}
TINY_ROWS, TINY_WIDTH, TINY_VOCAB = 64, 64, 1000
GPU_ROWS = 8192
BUDGET_S = {"cpu": 2.5, "cuda": 1.0}  # of one contestant's timed runs in a case; ten minutes in all
TARGET_BUDGET_S = {"cpu": 20.0, "cuda": 5.0}
FILL_ROWS = 8192  # of the weight, drawn at a time


@dataclass(frozen=True)
class Shape:
    model: str
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16

    def text(self) -> str:
        precision = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[self.dtype]
        return f"{self.rows} x {self.width} x {self.vocab} {precision}" + (f" ({self.model})" if self.model else "")


MODELS = (Shape("0.5B", 1024, 896, 151936), Shape("3B", 256, 3072, 128256), Shape("8B", 128, 4096, 128256))
SMALL = Shape("", 256, 896, 32000, torch.float32)
KL = (Shape("", 512, 1024, 32000), Shape("0.5B", 512, 896, 151936))

FROZEN_TARGETS = (
    Target("TRL chunked", at_least=9),
    Target("eager", at_least=2.3),
    Target(GEMMS, at_most=1.05),
    Target("eager", "memory", at_least=20),
)
GPU_TARGETS: dict[Work, tuple[Target, ...]] = {  # of one H200, 8,192 rows of the 8B head
    "entropy": (Target(at_most=14e-3),),
    "frozen": (
        Target(at_most=27e-3),
        Target("Liger scaled CE", at_least=1.5),
        Target(quantity="memory", at_most=0.45e9),
    ),
    "kl": (Target(at_most=28e-3), Target(quantity="memory", at_most=0.7e9)),
}
KL_TARGETS = (Target("eager", at_least=3), Target("eager", "memory", at_least=10))


@dataclass
class Inputs:
    hidden: Tensor  # [N, H]
    ref_hidden: Tensor  # [N, H], a little off
    weight: Tensor  # [V, H], logits of standard deviation 1
    target: Tensor  # [N]
    upstream: Tensor  # fp32 [N]


def make_inputs(shape: Shape, device: str, trained: bool) -> Inputs:
    """Drawn block by block straight into place, so that making them leaves no large free blocks behind."""
    torch.manual_seed(0)
    weight = torch.empty(shape.vocab, shape.width, dtype=shape.dtype, device=device)
    for block in weight.split(FILL_ROWS):
        block.normal_(std=shape.width**-0.5)
    hidden = torch.randn(shape.rows, shape.width, device=device)
    ref_hidden = (hidden + 0.05 * torch.randn_like(hidden)).to(shape.dtype)
    target = torch.randint(shape.vocab, (shape.rows,), device=device)
    upstream = torch.randn(shape.rows, device=device)
    return Inputs(
        hidden.to(shape.dtype).requires_grad_(), ref_hidden, weight.requires_grad_(trained), target, upstream
    )  # fmt: skip


def cases(device: str = "cpu") -> Iterator[Case]:
    """Memory is measured for one head, the smallest on a CPU and the largest on a GPU, and for KL."""
    return _gpu_cases() if device == "cuda" else _cpu_cases()


def _cpu_cases() -> Iterator[Case]:
    yield _case("frozen", MODELS[0], "cpu", FROZEN_TARGETS)
    yield _case("kl", KL[0], "cpu", KL_TARGETS)
    for model in MODELS:
        yield _case("score", model, "cpu", memory=False)
        if model is not MODELS[0]:
            yield _case("frozen", model, "cpu", memory=False)
        yield _case("trained", model, "cpu", memory=model is MODELS[0])
    yield _case("kl", KL[1], "cpu", memory=False)
    yield _case("frozen", SMALL, "cpu", memory=False)


def _gpu_cases() -> Iterator[Case]:
    works: tuple[Work, ...] = ("score", "entropy", "frozen", "trained", "kl")
    for model in MODELS:
        for work in works:
            last = model is MODELS[-1]
            targets = GPU_TARGETS.get(work, ()) if last else ()
            yield _case(work, replace(model, rows=GPU_ROWS), "cuda", targets, memory=last)


def _case(work: Work, shape: Shape, device: str, targets: tuple[Target, ...] = (), memory: bool = True) -> Case:
    def build(tiny: bool) -> dict[str, Prepare]:
        used = replace(shape, rows=TINY_ROWS, width=TINY_WIDTH, vocab=TINY_VOCAB) if tiny else shape
        inputs = make_inputs(used, device, trained=work == "trained")
        found: dict[str, Prepare] = {name: _contestant(load, work, inputs, device) for name, load in HEADS.items()}
        found[GEMMS] = lambda: gemms_alone(work, inputs)
        return found

    budget = (TARGET_BUDGET_S if targets else BUDGET_S)[device]
    least = 3 if targets else 1
    return Case(f"{NAMES[work]}: {shape.text()}", build, "eager", targets, memory, budget, least)


def _contestant(load: Callable[[str], Head], work: Work, inputs: Inputs, device: str) -> Prepare:
    def prepare() -> Run:
        head = load(device)
        if work == "kl" and head.divergence is None:
            raise Unavailable("no exact KL a token")
        if work == "entropy" and head.entropy is None:
            raise Unavailable("no entropy")
        if work in ("frozen", "trained") and head.scoring_only:
            raise Unavailable("for scoring only")
        if work == "trained" and head.frozen_only:
            raise Unavailable("frozen head only")
        return contestant(head, work, inputs)

    return prepare


def contestant(head: Head, work: Work, inputs: Inputs) -> Run:
    """The work done by one head; returns its outputs, so that none is dropped while the clock runs."""
    hidden, weight, target = inputs.hidden, inputs.weight, inputs.target

    def score() -> object:
        with torch.no_grad():
            return head.logprob(hidden, weight, target)

    def divergence() -> object:
        assert head.divergence is not None
        with torch.no_grad():
            return head.divergence(hidden, inputs.ref_hidden, weight, target)

    def entropy() -> object:
        assert head.entropy is not None
        with torch.no_grad():
            return head.entropy(hidden, weight, target)

    def both_ways() -> object:
        logprob = head.logprob(hidden, weight, target)
        wanted = [hidden, weight] if work == "trained" else [hidden]
        upstream = None if head.summed else inputs.upstream.to(logprob.dtype)
        return logprob.detach(), torch.autograd.grad(logprob, wanted, upstream)

    forward_only = {"score": score, "entropy": entropy, "kl": divergence}
    return forward_only.get(work, both_ways)


def gemms_alone(work: Work, inputs: Inputs) -> Run:
    """The products of each kind of work: logits (of policy and reference), and, going back, to hidden and weight.

    A trained head needs three at least; recomputing the logits in the backward, to save memory, makes it four.
    """
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach()
    sides = [hidden, inputs.ref_hidden] if work == "kl" else [hidden]
    buffers: list[Tensor] = []

    def run() -> None:
        if not buffers:
            buffers.extend([hidden.new_empty(len(hidden), len(weight)), torch.empty_like(hidden)])
            if work == "trained":
                buffers.append(torch.empty_like(weight))
        for side in sides:
            torch.mm(side, weight.t(), out=buffers[0])
        if work in ("frozen", "trained"):
            torch.mm(buffers[0], weight, out=buffers[1])
        if work == "trained":
            torch.mm(buffers[0].t(), hidden, out=buffers[2])

    return run
