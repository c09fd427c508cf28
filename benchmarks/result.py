"""A benchmark's outcome, written to and read from JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Timing:
    """One contestant in one case; seconds and bytes are None where it did not run, `unavailable` then says why."""

    case: str
    contestant: str
    median_s: float | None = None
    min_s: float | None = None
    max_s: float | None = None
    rounds: int = 0
    ratio: float | None = None  # the base's median over this one's: above 1 is faster than the base
    peak_bytes: int | None = None  # above the inputs
    unavailable: str = ""
    tokens: int | None = None  # that a run is worth; ratios are then of times a token
    figures: dict[str, str] = field(default_factory=dict)  # further columns

    @property
    def cost(self) -> float | None:
        """Seconds, of a token where tokens are counted."""
        return self.median_s / (self.tokens or 1) if self.median_s is not None else None


@dataclass
class Verdict:
    """A target beside what was measured: a ratio to `over`, or, where that is empty, seconds or bytes. Or an error, a
    share or a count: `over` then says of what.

    `measured` is None where one of the two did not run.
    """

    case: str
    over: str
    quantity: str
    bound: str
    measured: float | None
    met: bool | None

    def sentence(self) -> str:
        if self.measured is None:
            return f"{self.quantity}{f' against {self.over}' if self.over else ''}: not measured, target {self.bound}"
        words = {
            ("time", "absolute"): f"{1e3 * self.measured:.1f} ms",
            ("memory", "absolute"): f"{self.measured / 2**20:.0f} MiB",
            ("time", ">="): f"{self.measured:.2f}x faster than {self.over}",
            ("time", "<="): f"{self.measured:.2f}x the time of {self.over}",
            ("memory", ">="): f"{self.measured:.1f}x less memory than {self.over}",
            ("memory", "<="): f"{self.measured:.2f}x the memory of {self.over}",
            ("error", "<="): f"{self.over}: relative error {self.measured:.1e}",
            ("share", "<="): f"{self.over}: {100 * self.measured:.2f} %",
            ("count", "<="): f"{self.over}: {self.measured:g}",
        }[self.quantity, self.bound[:2] if self.over else "absolute"]
        return f"{words}: target {self.bound}, {'met' if self.met else 'missed'}"


@dataclass
class Result:
    """Everything one run of `python -m benchmarks NAME` found. `others` is the processors' share that others took."""

    benchmark: str
    device: str
    date: str
    machine: dict[str, object]
    versions: dict[str, str]
    commit: str
    warning: str = ""
    others: float | None = None
    timings: list[Timing] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Result":
        """Raises ValueError where the file is no result of this program."""
        try:
            plain = json.loads(path.read_text())
            timings = [Timing(**t) for t in plain.pop("timings")]
            verdicts = [Verdict(**v) for v in plain.pop("verdicts")]
            return Result(**plain, timings=timings, verdicts=verdicts)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a result written with --json: {error}") from error
