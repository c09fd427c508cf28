"""Which adapter each row of the running forward uses, for all LoRALinears of one model.

transformers passes no keyword to a Linear, so the routing lies here: set on entry to the model's forward, restored on
the way out, each thread with its own. It is resolved once a forward to the adapters its rows use, by name.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_kernels.nn.siblings import Pending, project
from rlhf_kernels.ops.lora.routing import Routing, used_alone

if TYPE_CHECKING:
    from rlhf_kernels.nn.lora import LoRALinear, LoraSpec


@dataclass
class Running:
    """A forward that is under way."""

    routing: Routing
    names: list[str]  # the adapters as `runs` and the routing's index count them
    scaling: list[float]  # of each of `names`
    runs: list[int] | None  # over `names`, which are those that rows use; None: the index says it, over all adapters
    index: Tensor | None  # as of the forward's start on the CPU: a checkpointed layer is recomputed under it
    pending: Pending | None = None  # what one projection has computed ahead for its siblings

    def read(self, layer: "LoRALinear", beside: list[Any] | None = None) -> list[Any] | None:
        """layer.tensors; None for one whose weight is of another kind than those `beside`."""
        found = layer.tensors(self.names)
        if beside is None:
            return found
        weight, mine = cast(Tensor, found[0]), beside[0]
        return found if weight.device == mine.device and weight.dtype == mine.dtype else None

    def compute(self, layers: "list[LoRALinear]", read: list[list[Any]], x: Tensor) -> list[Tensor]:
        return project(layers, read, x, self)


@dataclass
class AdapterRoutes:
    """The adapters of one model, in slot order, and the routing of the forward that is running (None: base only)."""

    specs: "dict[str, LoraSpec]" = field(default_factory=dict)
    _thread: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    def __getstate__(self) -> "dict[str, LoraSpec]":
        return self.specs  # a copy starts with no forward running

    def __setstate__(self, specs: "dict[str, LoraSpec]") -> None:
        self.specs, self._thread = specs, threading.local()

    def slot(self, name: str | None) -> int:
        """The index of an adapter in a routing; -1, the bypass, for None."""
        return -1 if name is None else list(self.specs).index(name)

    @property
    def running(self) -> Running | None:
        """This thread's forward."""
        return getattr(self._thread, "running", None)

    @property
    def current(self) -> Routing | None:
        """The routing of this thread's forward."""
        return None if self.running is None else self.running.routing

    @contextmanager
    def use(self, routing: Routing | None) -> Iterator[None]:
        """Routes the forwards inside; an index on the CPU is read here.

        ValueError for a routing over another number of adapters than the model has.
        """
        with self._resume(None if routing is None else self._resolve(routing)):
            yield

    def checkpoint(self, run: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
        """torch's checkpoint, with the forward's routing restored while the backward recomputes `run`."""
        running = None if self.running is None else replace(self.running, pending=None)
        if use_reentrant:

            def rerouted(*inputs: Any) -> Any:
                with self._resume(running):
                    return run(*inputs)

            return checkpoint(rerouted, *args, use_reentrant=True, **kwargs)
        return checkpoint(
            run, *args, use_reentrant=False, context_fn=lambda: (self._resume(running), self._resume(running)), **kwargs
        )

    @contextmanager
    def _resume(self, running: Running | None) -> Iterator[None]:
        """Nothing pending on the way in, nor kept on the way out: what a projection computed ahead ends here."""
        before = self.running
        self._thread.running = None if running is None else replace(running, pending=None)
        try:
            yield
        finally:
            self._thread.running = before

    def _resolve(self, routing: Routing) -> Running:
        names = list(self.specs)
        if routing.adapters != len(names):
            raise ValueError(f"routing was built for {routing.adapters} adapters; the model has {len(names)}")
        runs = routing.host_runs()
        if runs is not None:  # adapters that no row uses are left out: they cost no layer anything
            used, runs = used_alone(runs)
            names = [names[e] for e in used]
        index = routing.index if runs is None else None
        if index is not None and index.device.type == "cpu":
            index = index.clone()
        return Running(routing, names, [self.specs[name].scaling for name in names], runs, index)
