"""What a run leaves behind while it goes: `metrics.jsonl`, `samples.jsonl`, a line on the terminal, trackers.

Every line is written and flushed as one object: a killed run loses at most its last line; a resumed one cuts the lines
after its checkpoint and goes on. JSON has no NaN: a value that is not finite is recorded as null.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from .config import TrainConfig
from .errors import UserError

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

# what the terminal shows, in order: the label, the metrics it may come from, its format
SHOWN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("loss", ("loss", "loss/total", "sft/loss", "reward/loss"), "{:.4f}"),
    ("reward", ("reward", "objective/scores"), "{:+.3f}"),
    ("kl", ("objective/kl",), "{:.4f}"),
    ("length", ("completions/mean_length",), "{:.1f}"),
    ("tok/s", ("sampling/tokens_per_second", "timing/tokens_per_second"), "{:,.0f}"),
)


class MetricsLog:
    """The record of one run in `output_dir`; `resume_step` is the checkpoint's step, None for a fresh run.

    Only the main process passes `main_process=True`; on the others every call does nothing.
    """

    def __init__(
        self,
        output_dir: str | Path,
        config: TrainConfig,
        resume_step: int | None = None,
        main_process: bool = True,
    ) -> None:
        self.active = main_process
        self.every = config.logging_steps
        self.last: dict[str, float] = {}
        if not main_process:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "config.yaml", config.to_yaml())
        self._trackers = _open_trackers(config, folder)
        for name in (METRICS, SAMPLES):
            cut_after(folder / name, -1 if resume_step is None else resume_step)
        # unbuffered: what a full disk refused is not tried again on closing
        self._metrics: BinaryIO = (folder / METRICS).open("ab", buffering=0)  # type: ignore[assignment]
        self._samples: BinaryIO = (folder / SAMPLES).open("ab", buffering=0)  # type: ignore[assignment]
        self._progress = make_progress(config.algorithm, config.total_steps, resume_step or 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line {"step": step, **values}; `values` are Python or tensor scalars."""
        if not self.active:
            return
        self.last = {k: float(v) for k, v in values.items()}
        _append(self._metrics, {"step": int(step), **{k: _finite(v) for k, v in self.last.items()}})
        self._progress.show(step, self.last, step % self.every == 0)
        for tracker in self._trackers:
            tracker.log(self.last, step=step)

    def completed(self, done: int, total: int) -> None:
        """Show how many of a rollout's completions are there."""
        if self.active:
            self._progress.completed(done, total)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append completions as {"step", "prompt", "completion", "reward", ...}."""
        if self.active:
            for row in rows:
                _append(self._samples, {"step": int(step), **row})

    def close(self) -> None:
        """Close the files, the progress bar and the trackers; safe to call twice."""
        if not self.active:
            return
        self.active = False
        self._progress.close()
        self._metrics.close()
        self._samples.close()
        for tracker in self._trackers:
            tracker.finish()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects in a JSONL file; nothing if it does not exist. A last line cut short by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no line break after it: the write was cut
                return
            raise UserError(f"{path}, line {number}: not JSON") from error


def cut_after(path: Path, step: int) -> None:
    """Leave only the lines of steps <= `step`, atomically; a missing file stays missing."""
    if not path.exists():
        return
    kept = [row for row in read_lines(path) if row.get("step", 0) <= step]
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _replace(path: Path, text: str) -> None:
    """The file holds `text`, or, if writing that fails, what it held before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _append(file: BinaryIO, row: Mapping[str, Any]) -> None:
    line = memoryview((json.dumps(row, ensure_ascii=False) + "\n").encode())
    while line:  # a disk that fills up takes a part, and refuses the rest
        line = line[file.write(line) :]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Progress(Protocol):
    """What the terminal shows of a run."""

    def show(self, step: int, values: Mapping[str, float], due: bool) -> None: ...

    def completed(self, done: int, total: int) -> None: ...

    def close(self) -> None: ...


def make_progress(title: str, total: int, done: int, file: TextIO | None = None) -> Progress:
    """A live bar where the output is a terminal, one plain line a step where it is not."""
    file = file or sys.stdout
    if file.isatty():
        return RichProgress(title, total, done, file)
    return PlainProgress(total, file)


def shown_values(values: Mapping[str, float]) -> dict[str, str]:
    """The few metrics worth a glance, formatted: {"reward": "+0.312", "kl": "0.0123", ...}."""
    found: dict[str, str] = {}
    for label, names, form in SHOWN:
        value = next((values[n] for n in names if n in values), None)
        if value is not None:
            found[label] = form.format(value)
    if "reward" in found:
        found.pop("loss", None)  # of a policy it says nothing
    return found


class PlainProgress:
    """`step 12/100  reward +0.312  kl 0.0123  length 45.2  tok/s 1,234`"""

    def __init__(self, total: int, file: TextIO) -> None:
        self.total, self.file = total, file

    def show(self, step: int, values: Mapping[str, float], due: bool) -> None:
        if due:
            parts = [f"{label} {value}" for label, value in shown_values(values).items()]
            print("  ".join([f"step {step}/{self.total}", *parts]), file=self.file, flush=True)

    def completed(self, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


class RichProgress:
    """A bar with the time left and the same few metrics, redrawn in place."""

    def __init__(self, title: str, total: int, done: int, file: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[metrics]}"),
            console=Console(file=file),
        )
        self.task = self.bar.add_task(title, total=total, completed=done, metrics="")
        self.rollout = self.bar.add_task("rollout", total=None, metrics="", visible=False)
        self.bar.start()

    def show(self, step: int, values: Mapping[str, float], due: bool) -> None:
        text = "  ".join(f"[dim]{label}[/] {value}" for label, value in shown_values(values).items())
        self.bar.update(self.task, completed=step, metrics=text)

    def completed(self, done: int, total: int) -> None:
        self.bar.update(self.rollout, completed=done, total=total, visible=done < total)

    def close(self) -> None:
        self.bar.stop()


def _open_trackers(config: TrainConfig, folder: Path) -> list[Any]:
    """accelerate's trackers by name, started; `config.validate` has seen that their packages are there."""
    if not config.report_to:
        return []
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which process is the main one
    trackers = []
    for name in config.report_to:
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(folder.name, logging_dir=str(folder)) if kind.requires_logging_directory else kind(folder.name)
        tracker.start()
        scalars = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in asdict(config).items()}
        tracker.store_init_configuration(scalars)
        trackers.append(tracker)
    return trackers
