"""The live bytes of a computation that runs on the meta device: every storage it makes, until it is freed.

What is recorded is a timeline of stretches, each with how much it adds and how high it rises above its beginning.
Stretches are cut at marks; those of one decoder layer may stand for many, so that three layers tell of eighty.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Scratch = Callable[[Any, tuple[Any, ...], dict[str, Any], list[Tensor]], int]  # of an op, its arguments and results


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


@dataclass
class Stretch:
    """`net`: bytes it leaves behind; `peak`: the most above its beginning; `label`: what it is part of."""

    label: str
    net: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Timeline:
    """Stretches in their order, each with how often it is repeated."""

    stretches: tuple[tuple[Stretch, int], ...]

    @property
    def peak(self) -> int:
        """The most live bytes above those at the beginning."""
        live = highest = 0
        for stretch, times in self.stretches:
            last = live + max(0, times - 1) * stretch.net
            highest = max(highest, (max(live, last) if times else 0) + stretch.peak * (times > 0))
            live += times * stretch.net
        return highest

    @property
    def net(self) -> int:
        """What is left at the end."""
        return sum(times * stretch.net for stretch, times in self.stretches)


class Meter(TorchDispatchMode):
    """Counts storages on the meta device that are made inside; those of `known` tensors are none of its business."""

    def __init__(self, known: Iterable[Tensor], scratch: Scratch) -> None:
        super().__init__()
        self._known = {id(t.untyped_storage()): t.untyped_storage() for t in known}
        self._scratch = scratch
        self._live: dict[int, Any] = {}
        self._now = 0  # within the stretch
        self.products: set[tuple[Any, ...]] = set()  # matrix products of a kind: dtype and shapes
        self.stretches = [Stretch("")]

    def mark(self, label: str) -> None:
        """Ends a stretch and begins the one called `label`."""
        self.stretches[-1].net = self._now
        self.stretches.append(Stretch(label))
        self._now = 0

    def finish(self) -> None:
        self.mark("")
        self.stretches.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # of whatever dtype: there are no values to read
        result = func(*args, **kwargs)
        if func in PRODUCTS:
            matrices = [a for a in args if isinstance(a, Tensor)][-2:]
            self.products.add((matrices[0].dtype, *(m.shape for m in matrices)))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        for tensor in made:
            self._see(tensor)
        self._rise(self._scratch(func, args, kwargs, made))
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known or key in self._live:
            return
        nbytes = storage.nbytes()
        self._live[key] = weakref.ref(storage, lambda _: self._free(key, nbytes))
        self._now += nbytes

    def _free(self, key: int, nbytes: int) -> None:
        if self._live.pop(key, None) is not None:
            self._now -= nbytes

    def _rise(self, scratch: int) -> None:
        last = self.stretches[-1]
        last.peak = max(last.peak, self._now + scratch)
