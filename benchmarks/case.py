"""What is measured: a case is one piece of work on one set of inputs, with the contestants that do it.

Inputs are made when the case is built, once for all its contestants; a contestant is prepared (its library imported)
only when it is to run, so that a fresh process that measures one contestant's memory loads no other's library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Run = Callable[[], object]
Prepare = Callable[[], Run]  # raises Unavailable

OURS = "rlhf_kernels"


class Unavailable(Exception):
    """Why a contestant cannot run here: "not installed", "needs a GPU", ... The table prints it in place of a time."""


@dataclass(frozen=True)
class Target:
    """A promise about ours: `at_least` times better than `over`, or `at_most` that multiple of what `over` takes.

    `over` is a contestant, or how the names of several begin: then the best of them. With `over` empty `at_most` is
    absolute, in seconds or bytes.
    """

    over: str = ""
    quantity: Literal["time", "memory"] = "time"
    at_least: float | None = None
    at_most: float | None = None

    def ratio(self, ours: float, theirs: float) -> float:
        """theirs / ours for "at least", ours / theirs for "at most"."""
        top, bottom = (theirs, ours) if self.at_least is not None else (ours, theirs)
        return top / bottom if bottom else float("inf")

    def met(self, ratio: float) -> bool:
        return ratio >= self.at_least if self.at_least is not None else ratio <= (self.at_most or 0.0)

    def bound(self) -> str:
        if not self.over:
            limit = self.at_most or 0.0
            return f"<= {1e3 * limit:g} ms" if self.quantity == "time" else f"<= {limit / 2**20:.0f} MiB"
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass(frozen=True)
class Check:
    """A promise about what ours computes: an error, a share or a count that may be `at_most` this large."""

    what: str
    error: float
    at_most: float
    quantity: Literal["error", "share", "count"] = "error"

    def bound(self) -> str:
        return f"<= {100 * self.at_most:g} %" if self.quantity == "share" else f"<= {self.at_most:g}"


@dataclass(frozen=True)
class Measure:
    """What a contestant in a process of its own found besides its time: its peak there, and further columns."""

    peak_bytes: int
    figures: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One piece of work.

    `build(tiny)` makes the inputs and returns the contestants by name; with `tiny` the same work on a shape of a few
    rows, which warms the libraries up before memory is measured. `base` is the contestant that speeds refer to.
    `memory` False leaves the case out of `--memory`. `budget_s` is how long one contestant's timed runs may take in
    all: a slow one gets fewer rounds, but `least_rounds`. `rounds` is for a case that wants another number of
    them than its device. `checks()` compares results, once, after the clock. An `extra` case runs only where its name
    begins with what `--only` says.

    `tokens`: how many tokens a contestant's run is worth. Contestants may then do different amounts of the work, and
    speeds and targets in time compare times a token. `warmed`: contestants warm up as they are prepared, since a whole
    run of the slow ones would take as long as the measurement. `measured()` gives, after the clock, what contestants in
    processes of their own found there. `clock`: another than the wall's, in seconds, on a CPU; time.process_time is
    right on a machine that others use, for contestants that all run on one thread.
    """

    name: str
    build: Callable[[bool], dict[str, Prepare]]
    base: str
    targets: tuple[Target, ...] = ()
    memory: bool = True
    budget_s: float = 20.0
    least_rounds: int = 1
    rounds: int | None = None
    checks: Callable[[], list[Check]] | None = None
    extra: bool = False
    tokens: Mapping[str, int] = field(default_factory=dict)
    warmed: bool = False
    measured: Callable[[], Mapping[str, Measure]] | None = None
    clock: Callable[[], float] | None = None


def ready(run: Run) -> Prepare:
    """A contestant that needs no preparation."""
    return lambda: run
