"""Which adapter each row of a PEFT model's running forward uses, by the adapters' names.

A Linear is called without keywords, so the route of the forward lies in one `Routes` object a model, shared by its
accelerated layers: set on entry, restored on the way out, and put back while a checkpointed layer is recomputed.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels.nn.siblings import Pending
from rlhf_kernels.ops.lora.routing import Routing, build_routing, repeated, triples, used_alone

BASE = "__base__"  # PEFT's word for the bypass in adapter_names
MOST_SPREADS = 8  # lengths of batches that a route remembers: one that lives on meets new ones without end


@dataclass(frozen=True)
class Spread:
    """A route over the rows of one layer: what the op takes."""

    index: Tensor | None
    runs: list[int] | None
    grad_rows: int | None
    order: Tensor | None = None


@dataclass(eq=False)
class Route:
    """A routing and the names of its adapter slots. Made once a forward, shared by all layers (siblings.Forward)."""

    adapters: tuple[str, ...]
    routing: Routing
    pending: Pending | None = None  # what one projection has computed ahead for its siblings
    spreads: dict[tuple[int, torch.device], Spread] = field(default_factory=dict)

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "Route":
        """One name a sample, BASE for the bypass."""
        adapters = tuple(dict.fromkeys(n for n in names if n != BASE))
        slot = {name: i for i, name in enumerate(adapters)} | {BASE: -1}
        return cls(adapters, build_routing(torch.tensor([slot[n] for n in names], dtype=torch.long), len(adapters)))

    def used(self) -> "Route":
        """Without the adapters that no row uses, where the host knows: they get None, not zeros, as gradients."""
        runs = self.routing.host_runs()
        if runs is None:
            return self
        slots, cut = used_alone(runs)
        names = tuple(self.adapters[e] for e in slots)
        return Route(names, Routing(len(slots), self.routing.rows, runs=tuple(cut), grad_rows=self.routing.grad_rows))

    def over(self, rows: int, device: torch.device) -> Spread:
        """The route of a layer whose input has `rows` rows, a multiple of the routing's."""
        found = self.spreads.get((rows, device))
        if found is None:
            if len(self.spreads) == MOST_SPREADS:
                self.spreads.clear()
            found = self.spreads[rows, device] = self._spread(rows, device)
        return found

    def _spread(self, rows: int, device: torch.device) -> Spread:
        routing, repeats = self.routing, self._repeats(rows)
        grad_rows = None if routing.grad_rows is None else routing.grad_rows * repeats
        runs = routing.host_runs()
        if runs is not None:
            return Spread(None, repeated(runs, repeats), grad_rows)
        assert routing.index is not None
        if repeats == 1 and routing.index.device == device:
            index = routing.index.clone() if device.type == "cpu" else routing.index  # kept for recomputations
            return Spread(index, None, grad_rows, routing.order)
        index = routing.index.to(device).repeat_interleave(repeats, output_size=rows)
        return Spread(index, None, grad_rows, build_routing(index, routing.adapters).order)

    def _repeats(self, rows: int) -> int:
        known = self.routing.rows
        if rows != known and (known == 0 or rows % known):
            raise ValueError(f"x has {rows} rows where the forward was routed for {known}; it must be a multiple")
        return rows // known if known else 1

    def read(self, layer: Any, beside: list[Any] | None = None) -> list[Any] | None:
        return layer.parts(self, beside)

    def compute(self, layers: list[Any], read: list[list[Any]], x: Tensor) -> list[Tensor]:
        return layers[0].product(layers, read, x, self)

    def names(self, rows: int) -> list[str]:
        """The name of each row's adapter: what PEFT's own forward takes. Reads an index that lies on a device."""
        spread = self.over(rows, torch.device("cpu"))
        if spread.runs is None:
            assert spread.index is not None
            slots = spread.index.tolist()
        else:
            slots = [e for lo, hi, e in triples(spread.runs) for _ in range(hi - lo)]
        return [BASE if e < 0 else self.adapters[e] for e in slots]


class Here(threading.local):
    """What one thread's forward is at; as siblings.Forward, that of a forward without a route."""

    current: Route | None = None
    learns: bool = False  # `current` was entered with gradients on
    kept: bool = False  # inside Checkpointed, which puts `current` back for the recomputation: None means what it says
    named: tuple[list[str], Route] | None = None  # the last adapter_names and their route
    pending: Pending | None = None  # of a forward without a route

    def read(self, layer: Any, beside: list[Any] | None = None) -> list[Any] | None:
        return layer.parts(None, beside)

    def compute(self, layers: list[Any], read: list[list[Any]], x: Tensor) -> list[Tensor]:
        return layers[0].product(layers, read, x, None)


class Routes:
    """The route of the forward that is running, each thread its own; None: every row uses the active adapters."""

    def __init__(self) -> None:
        self.here = Here()
        self.suspect = False  # a routed forward looked as if something else than Checkpointed would recompute it

    def __reduce__(self) -> tuple[type["Routes"], tuple[()]]:
        return Routes, ()  # a copy starts with no forward running, or to recompute

    @contextmanager
    def use(self, route: Route | None, kept: bool = False) -> Iterator[None]:
        """Nothing pending on the way in, nor kept on the way out: what a projection computed ahead ends here."""
        here = self.here
        before = here.current, here.learns, here.kept
        here.current, here.learns, here.kept = route, torch.is_grad_enabled(), kept
        self._forget(route)
        try:
            yield
        finally:
            here.current, here.learns, here.kept = before
            self._forget(route)

    def _forget(self, route: Route | None) -> None:
        self.here.pending = None
        if route is not None:
            route.pending = None

    def of_names(self, names: Sequence[str]) -> Route:
        """The route of PEFT's adapter_names: built by the first layer that asks, kept for the others."""
        named = self.here.named
        if named is None or named[0] != names:
            named = self.here.named = list(names), Route.of_names(names)
        self.suspect |= _tensors_are_packed()
        return named[1]

    def running(self) -> Route | None:
        """This forward's; RuntimeError where a recomputation has lost it."""
        here = self.here
        if here.kept or torch.compiler.is_compiling():
            return here.current
        if here.current is not None:
            self.suspect |= here.learns and (_tensors_are_packed() or not torch.is_grad_enabled())
        elif self.suspect and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a checkpointed layer is recomputed without the route of its forward: enable checkpointing with the "
                "model's gradient_checkpointing_enable before the routed forward, not by other means"
            )
        return here.current


def _tensors_are_packed() -> bool:
    """Whether what autograd saves goes through a hook now, as under torch's checkpoint (and under save_on_cpu)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class Checkpointed:
    """A transformers checkpointing function that recomputes under the route of the forward."""

    def __init__(self, routes: Routes, run: Callable[..., Any]) -> None:
        self.routes = routes
        self.run = run

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        route = self.routes.here.current

        def rerouted(*inputs: Any, **named: Any) -> Any:
            with self.routes.use(route, kept=True):
                return function(*inputs, **named)

        return self.run(rerouted, *args, **kwargs)


def keep_routes(module: nn.Module, routes: Routes) -> None:
    """Makes a module that transformers checkpoints recompute under its forward's route; harmless when done already."""
    run = module.__dict__.get("_gradient_checkpointing_func")
    if run is not None and not isinstance(run, Checkpointed):
        module.__dict__["_gradient_checkpointing_func"] = Checkpointed(routes, run)


def forget_routes(module: nn.Module) -> None:
    """Undoes `keep_routes`."""
    run = module.__dict__.get("_gradient_checkpointing_func")
    if isinstance(run, Checkpointed):
        module.__dict__["_gradient_checkpointing_func"] = run.run
