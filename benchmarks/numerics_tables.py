"""The numerics report for the terminal and as Markdown."""

from benchmarks.case import OURS
from benchmarks.numerics import Report, Section, number
from benchmarks.tables import grid

INTRODUCTION = (
    "Relative errors against float64 of the same bf16 inputs ({shape}); medians. Made by\n"
    "`python -m benchmarks numerics --write`. A gradient returned in bf16 is off by about 1.7e-3 from that alone."
)


def table_rows(section: Section) -> list[list[str]]:
    """The truths first, then each contestant that has the output."""
    rows = [[f"({section.quantity} in float64)", *map(number, section.truths)]]
    rows += [[name, *map(number, errors)] for name, errors in section.errors.items() if errors is not None]
    return rows


def absent(section: Section) -> str:
    """One line on who is missing and why; "" if nobody is."""
    without = [name for name, errors in section.errors.items() if errors is None]
    parts = [f"No such output: {', '.join(without)}"] if without else []
    parts += [f"{name}: {why}" for name, why in section.unavailable.items()]
    return "; ".join(parts)


def markdown(report: Report) -> str:
    parts = [INTRODUCTION.format(shape=report.shape)]
    for section in report.sections:
        parts += [f"**{section.title}**", grid(("", *section.columns), table_rows(section), bold=OURS)]
        if line := absent(section):
            parts.append(line + ".")
    return "\n\n".join(parts)


def print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    console.print(INTRODUCTION.format(shape=report.shape) + "\n")
    for section in report.sections:
        table = Table(title=section.title, title_justify="left", title_style="bold")
        table.add_column("", no_wrap=True)
        for column in section.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in table_rows(section):
            table.add_row(*row, style="bold" if row[0] == OURS else "dim" if row[0].startswith("(") else "")
        console.print(table)
        if line := absent(section):
            console.print(f"  {line}", style="dim")
