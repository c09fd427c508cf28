"""What one part of the claims found: a file of its own with its provenance, and each claim with ours beside it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.claims_scale import Scale, Workshop
from benchmarks.result import Result

Data = dict[str, Any]  # what a part measured, as plain values


@dataclass(frozen=True)
class Claim:
    """A paper's figure beside ours. `met` None: nothing that could be met, or not measured."""

    what: str
    paper: str
    ours: str
    met: bool | None

    def row(self) -> list[str]:
        return [self.what, self.paper, self.ours, {True: "yes", False: "**no**", None: ""}[self.met]]


@dataclass
class Record(Result):
    """A result whose figures are a part's own."""

    scale: str = ""
    seconds: float = 0.0
    data: Data = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Record":
        """Raises ValueError where the file is no record of this program."""
        try:
            return Record(**json.loads(path.read_text()))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a record of `python -m benchmarks claims`: {error}") from error


@dataclass(frozen=True)
class Part:
    """One group of claims: how it is measured, told, judged and drawn (file name -> drawing into that path)."""

    name: str
    measure: Callable[[Scale, Workshop], Data]
    markdown: Callable[[Data], str]
    claims: Callable[[Data], list[Claim]]
    pictures: dict[str, Callable[[Data, Path], None]] = field(default_factory=dict)


def megabytes(count: float) -> str:
    """In units of 10^6 bytes, as parameters are counted."""
    return f"{count / 1e6:,.1f}"


def percent(ratio: float) -> str:
    """The change that a ratio is: 0.6 is -40 %."""
    return f"{100 * (ratio - 1):+.0f} %"
