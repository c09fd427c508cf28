"""Each of our backends alone, whatever the op would choose: from how many rows on which one is the fastest."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from benchmarks.case import OURS, Prepare, Run, Unavailable
from benchmarks.lora_layer import Inputs, Work, runs
from benchmarks.lora_peers import ours
from rlhf_kernels.ops.lora import small, tier, triton_tier


def names(device: str) -> dict[str, Any]:
    """The op's tiers that a device may have, by the contestant's name."""
    return {
        f"{OURS}: {module.__name__.rpartition('.')[2]}": module  # type: ignore[attr-defined]  # tiers are modules
        for backend, module in tier.TIERS
        if device == "cuda" or (backend, module) not in (("triton", triton_tier), ("native", small))
    }


def alone(module: Any, work: Work, inputs: Inputs) -> Prepare:
    """The work through one tier, even where it would not be chosen; Unavailable where it cannot do it."""

    def prepare() -> Run:
        run = runs(ours(inputs), work, inputs)

        def restricted() -> object:
            with only(module):
                return run()

        try:
            restricted()
        except (RuntimeError, ValueError, TypeError) as error:
            raise Unavailable(f"fails: {str(error).splitlines()[0][:60]}") from error
        return restricted

    return prepare


@contextmanager
def only(module: Any) -> Iterator[None]:
    """The op has no other tier meanwhile, and this one takes everything."""
    forced = SimpleNamespace(forward=module.forward, backward=module.backward, serves=lambda *_: True)
    before, tier.TIERS = tier.TIERS, (("native", forced),)  # type: ignore[assignment]  # looks like a module
    try:
        yield
    finally:
        tier.TIERS = before
