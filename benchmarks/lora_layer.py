"""The inputs of one LoRA linear, and how a contestant is run on them.

x [M, K] requires a gradient, the weight [N, K] is frozen, and the backward starts from a given dY [M, N]. Rows use one
adapter, or each its own by an index in which -1 is no adapter at all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.case import Run, Unavailable

Work = Literal["forward", "both"]
Rows = Literal["one", "mixed", "scattered", "roles"]

SCALING = 2.0  # alpha = 2 r, a common choice
BF16 = torch.bfloat16
PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Layer:
    """`rows` x `width` -> `out` with adapters of rank r; `routed` says which adapter each row uses.

    one: all the only adapter; mixed: the adapters and no adapter in turns; scattered: drawn at random; roles: two
    adapters' rows one after the other, then as many without.
    """

    rows: int
    width: int
    out: int
    r: int = 16
    adapters: int = 1
    routed: Rows = "one"
    dtype: torch.dtype = BF16

    def text(self) -> str:
        return f"{self.rows} x {self.width} -> {self.out}, r={self.r}, {PRECISION[self.dtype]}"

    def tiny(self) -> "Layer":
        """The same work on a shape of a few rows."""
        return replace(self, rows=min(self.rows, 12), width=32, out=48, r=min(self.r, 8))

    def index(self) -> Tensor | None:
        """int64 [rows] on the CPU, None for one adapter."""
        if self.routed == "one":
            return None
        if self.routed == "roles":
            part = self.rows // 3
            return torch.tensor([0, 1, -1]).repeat_interleave(torch.tensor([part, part, self.rows - 2 * part]))
        if self.routed == "mixed":
            return torch.arange(self.rows) % (self.adapters + 1) - 1
        return torch.randint(self.adapters, (self.rows,))


@dataclass
class Inputs:
    x: Tensor  # [M, K]
    weight: Tensor  # [N, K], frozen
    a: Tensor  # [n, r, K]
    b: Tensor  # [n, N, r]
    index: Tensor | None  # int64 [M], on the device
    rows: tuple[int, ...] | None  # the same on the host
    upstream: Tensor  # [M, N]

    def matrices(self, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Every contestant's own A and B of each adapter, which require gradients."""
        a, b = ([m.to(dtype or m.dtype, copy=True).requires_grad_() for m in side] for side in (self.a, self.b))
        return a, b


def make_inputs(layer: Layer, device: str) -> Inputs:
    """Drawn in the layer's dtype straight away, so that making them leaves no large free blocks behind."""
    torch.manual_seed(0)
    index = layer.index()

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=layer.dtype, device=device).normal_(std=std)

    return Inputs(
        x=draw(layer.rows, layer.width).requires_grad_(),
        weight=draw(layer.out, layer.width, std=layer.width**-0.5),
        a=draw(layer.adapters, layer.r, layer.width, std=layer.width**-0.5),
        b=draw(layer.adapters, layer.out, layer.r, std=layer.r**-0.5),
        index=None if index is None else index.to(device),
        rows=None if index is None else tuple(index.tolist()),
        upstream=draw(layer.rows, layer.out),
    )


@dataclass(frozen=True)
class Linear:
    """One way of doing the work: y of x, whole or in parts of its rows, and the parameters that get gradients.

    `parameters`: A of every adapter, then B of every adapter. `trains` False: no backward. `captures` False: a CUDA
    graph cannot hold it.
    """

    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    parameters: tuple[Tensor, ...] = ()
    trains: bool = True
    captures: bool = True


def runs(linear: Linear, work: Work, inputs: Inputs) -> Run:
    """The work as a run; it returns what it made, so that nothing is freed while the clock runs."""
    if work == "forward":
        x = inputs.x.detach()

        @torch.no_grad()
        def forward() -> object:
            return linear.forward(x)

        return forward
    if not linear.trains:
        raise Unavailable("inference only")
    leaves = (inputs.x, *linear.parameters)

    def both_ways() -> object:
        y = linear.forward(inputs.x)
        assert isinstance(y, Tensor)
        y.backward(inputs.upstream)
        return y.detach(), taken(leaves)

    return both_ways


def taken(leaves: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The leaves' gradients, which they give up: the next backward writes new ones, as after an optimizer's step."""
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def captured(run: Run) -> Run:
    """The run as one CUDA graph, as serving engines decode: what the host takes to launch it is on nobody's bill."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or compiled on first use must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
