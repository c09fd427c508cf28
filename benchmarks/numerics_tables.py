"""The numerics report for the terminal and as Markdown."""

import math

from benchmarks.case import OURS
from benchmarks.numerics import Report, Section
from benchmarks.tables import grid

INTRODUCTION = (
    "Errors against float64 of the same bf16 inputs ({shape}); medians. Made by `python -m benchmarks numerics --write`."
    " A gradient returned in bf16 is off by about 1.7e-3 from its rounding alone. \"-\": no such output."
)  # fmt: skip


def number(value: float) -> str:
    return "nan" if math.isnan(value) else f"{value:.1e}"


def table_rows(section: Section) -> list[list[str]]:
    """The truths first, then each contestant, and why one is missing."""
    rows = [[f"({section.quantity}, float64)", *(number(t) for t in section.truths)]]
    for name, errors in section.errors.items():
        rows.append([name, *(["-"] * len(section.columns) if errors is None else map(number, errors))])
    for name, why in section.unavailable.items():
        rows.append([name, why, *[""] * (len(section.columns) - 1)])
    return rows


def markdown(report: Report) -> str:
    parts = [INTRODUCTION.format(shape=report.shape)]
    for section in report.sections:
        parts += [f"**{section.title}**", grid(("", *section.columns), table_rows(section), bold=OURS)]
    return "\n\n".join(parts)


def print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    console.print(f"Errors against float64; {report.shape}; medians")
    for section in report.sections:
        table = Table(title=section.title, title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        for column in section.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in table_rows(section):
            table.add_row(*row, style="bold" if row[0] == OURS else "dim" if row[0].startswith("(") else "")
        console.print(table)
