"""`python -m benchmarks claims`: the papers' claims, each measured with the trainer itself, and docs/reproduction.md.

A part measures some of them and leaves a record, benchmarks/results/DEVICE/claims/PART.json; the page is written from
the records that are there, so that one part can be measured again without the others.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    claims_exact,
    claims_latency,
    claims_memory,
    claims_quality,
    claims_regularisers,
    claims_remax,
    machine,
    tables,
)
from benchmarks.claims_record import Part, Record
from benchmarks.claims_scale import SCALES, Scale, Workshop

PAGE = machine.ROOT / "docs" / "reproduction.md"
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        claims_memory.PART, claims_exact.PART, claims_latency.PART, claims_remax.PART, claims_quality.PART,
        claims_regularisers.PART,
    )
}  # fmt: skip
HEADS = ("claim", "paper", "ours", "holds")


def measure(
    scale: Scale, names: Sequence[str], report: Callable[[Record], None] = lambda record: None
) -> dict[str, Record]:
    """The records of the parts named, in their order; `report` is called with each as it is done."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(scale, Path(folder))
        for name in (name for name in PARTS if name in names):
            started, quiet, warning = time.perf_counter(), machine.Quietness(), machine.load_warning()
            data = PARTS[name].measure(scale, workshop)
            found[name] = Record(
                name, scale.device, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", machine.describe(scale.device),
                machine.versions(), machine.commit(), warning, quiet.others(), scale=scale.name,
                seconds=time.perf_counter() - started, data=data,
            )  # fmt: skip
            report(found[name])
    return found


def results(device: str) -> Path:
    """Where the records of a device are kept."""
    return machine.ROOT / "benchmarks" / "results" / device / "claims"


def read(device: str) -> dict[str, Record]:
    """The records that are there."""
    files = {name: results(device) / f"{name}.json" for name in PARTS}
    return {name: Record.read(file) for name, file in files.items() if file.is_file()}


def summary(records: dict[str, Record]) -> str:
    """Every claim in one table."""
    rows = [claim.row() for name, record in records.items() for claim in PARTS[name].claims(record.data)]
    return tables.grid(HEADS, rows)


def section(record: Record) -> str:
    """A part's tables with the machine they were measured on."""
    minutes = f"`python -m benchmarks claims --only {record.benchmark}`: {record.seconds / 60:.0f} minutes. "
    return f"{PARTS[record.benchmark].markdown(record.data)}\n\n{minutes}{tables.provenance(record)}"


def write_page(records: dict[str, Record], page: Path = PAGE) -> None:
    """Figures between the page's markers, pictures beside it; parts without a record keep what they have."""
    tables.write_between(page, "summary", summary(records))
    for name, record in records.items():
        text = section(record)
        for picture, draw in PARTS[name].pictures.items():
            draw(record.data, page.parent / "images" / picture)
            text += f"\n\n![{name}](images/{picture})"
        tables.write_between(page, name, text)


def run(scale_name: str, only: Sequence[str], write: bool, again: bool) -> None:
    """The command: measures the parts (with `again` none), prints them and, with `write`, keeps records and page."""
    scale = SCALES[scale_name]
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        sys.exit(f"--only {unknown[0]!r}: no such part; there are {', '.join(PARTS)}")

    def keep(record: Record) -> None:
        print(f"\n## {record.benchmark}\n\n{section(record)}\n", flush=True)
        if write:
            record.write(results(scale.device) / f"{record.benchmark}.json")

    found = {} if again else measure(scale, only or list(PARTS), keep)
    if again or write:
        found = read(scale.device)
    print(summary(found))
    if write and scale.device == "cpu":
        write_page(found)
