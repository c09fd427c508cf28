"""The kernel table of docs/kernels.md: every GPU kernel in every shipped configuration, as its compiler left it.

A compiler joins with a function `() -> list[Row]` in SOURCES (nvcc's rows of the .cu files, say): it may run whatever
it needs, must not need a GPU, and its kernels' names must not be those of another source. `arch` is one of
`shipped.ARCHES` (sm_90 for nvcc's sm_90a).
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.kernels import nvcc, triton_aot
from benchmarks.kernels.row import Row
from rlhf_kernels.ops.shipped import ARCHES

SOURCES: list[Callable[[], list[Row]]] = [triton_aot.rows, nvcc.rows]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"


def everything() -> list[Row]:
    """The rows of every source, by kernel."""
    return sorted((row for source in SOURCES for row in source()), key=lambda row: row.kernel)


def markdown(rows: Iterable[Row]) -> str:
    """One line a kernel, one column a chip; a cell is "threads x registers / shared bytes / spilled bytes", and the
    matrix instructions."""
    cells: dict[str, dict[str, str]] = {}
    for r in rows:
        cell = f"{r.threads} x {r.registers} / {r.shared} / {r.spilled} {r.matrix}".strip()
        if cells.setdefault(r.kernel, {}).setdefault(r.arch, cell) != cell:
            raise ValueError(f"two kernels are called {r.kernel} on {r.arch}")
    lines = [["kernel", *ARCHES], ["---"] * (1 + len(ARCHES))]
    lines += [[kernel, *(of.get(arch, "") for arch in ARCHES)] for kernel, of in cells.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(text: str) -> str:
    """What stands between the two marks of a document."""
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in inside + after or END in before + after:
        raise ValueError(f"the document must have {BEGIN} once and then {END} once")
    return inside


def write(rows: Iterable[Row], document: Path = DOCUMENT) -> None:
    """Puts the table between the document's marks."""
    text = document.read_text()
    document.write_text(text.replace(BEGIN + block(text) + END, f"{BEGIN}\n{markdown(rows)}\n{END}"))


def documented(document: Path = DOCUMENT) -> str:
    """The table that stands in a document."""
    return block(document.read_text()).strip()
