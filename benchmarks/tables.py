"""Results as tables: for the terminal, and as Markdown between two markers of a file."""

from collections.abc import Iterable
from pathlib import Path

from benchmarks.case import OURS
from benchmarks.result import Result, Timing

COLUMNS = ("contestant", "median ms", "min", "max", "rounds", "speed", "peak MiB")
BENCHED = ("head", "lora", "generation")  # what `make bench` runs
RATE = "tokens/s"  # one column more, after the first, where a case counts tokens


def heading(result: Result) -> str:
    machine = result.machine
    if "gpu" in machine:
        return f"`{result.benchmark}` on {machine['gpu']}"
    isa = machine["isa"]
    widest = isa[-1] if isinstance(isa, list) and isa else "no vector extension"
    return f"`{result.benchmark}` on {machine['cpu']}, {machine['threads']} threads, {widest}"


def provenance(result: Result) -> str:
    """One sentence: when, from which commit, with what, and how quiet the machine was."""
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    parts = [f"Measured {result.date} at commit {result.commit or 'unknown'} with {versions}."]
    environment = result.machine.get("environment")
    if isinstance(environment, dict) and environment:
        parts.append("Environment: " + ", ".join(f"{k}={v}" for k, v in environment.items()) + ".")
    if result.others is not None:
        parts.append(f"Other programs took {100 * result.others:.0f} % of the processors meanwhile.")
    if result.warning:
        parts.append(f"Warning: {result.warning}.")
    return " ".join(parts)


def columns(timings: list[Timing]) -> tuple[str, ...]:
    rate = (RATE,) if any(t.tokens for t in timings) else ()
    return (COLUMNS[0], *rate, *COLUMNS[1:], *_figures(timings))


def _figures(timings: list[Timing]) -> list[str]:
    """The names of further columns."""
    return list(dict.fromkeys(name for timing in timings for name in timing.figures))


def rows(timings: list[Timing]) -> list[list[str]]:
    """The rows of `columns`."""
    further = _figures(timings)
    found = [cells(timing) + [timing.figures.get(name, "") for name in further] for timing in timings]
    if RATE in columns(timings):
        for row, timing in zip(found, timings):
            row.insert(1, f"{1 / timing.cost:.0f}" if timing.tokens and timing.cost else "")
    return found


def cells(timing: Timing) -> list[str]:
    """The row of `COLUMNS` for one contestant; why it did not run stands in place of its median."""
    if timing.median_s is None:
        return [timing.contestant, timing.unavailable or "-", "", "", "", "", ""]
    times = [_milliseconds(s) for s in (timing.median_s, timing.min_s, timing.max_s)]
    peak = "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.0f}"
    speed = "" if timing.ratio is None else f"{timing.ratio:.2f}x"
    return [timing.contestant, *times, str(timing.rounds), speed, peak]


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def by_case(result: Result) -> dict[str, list[Timing]]:
    grouped: dict[str, list[Timing]] = {}
    for timing in result.timings:
        grouped.setdefault(timing.case, []).append(timing)
    return grouped


def print_case(result: Result, case: str) -> None:
    """One case as a table in the terminal, its verdicts below."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(title=case, title_justify="left", title_style="bold")
    timings = by_case(result)[case]
    for column in columns(timings):
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for timing, row in zip(timings, rows(timings)):
        style = "bold" if timing.contestant == OURS else "dim" if timing.median_s is None else ""
        table.add_row(*row, style=style)
    console.print(table)
    for verdict in result.verdicts:
        if verdict.case == case:
            console.print(f"  {verdict.sentence()}", style={True: "green", False: "red", None: "dim"}[verdict.met])


def markdown(results: Iterable[Result]) -> str:
    """Every result as Markdown; where one of `BENCHED` has none from a CPU or a GPU, that is said, with its targets."""
    found = list(results)
    measured = {(result.benchmark, result.device) for result in found}
    parts = [_result_markdown(result) for result in found]
    for name in BENCHED:
        if (name, "cpu") not in measured:
            parts.append(f"### `{name}` on a CPU: not measured\n\n`make bench` measures it.")
        if (name, "cuda") not in measured:
            parts.append(_gpu_markdown(name))
    return "\n\n".join(parts)


def _result_markdown(result: Result) -> str:
    parts = [f"### {heading(result)}", provenance(result)]
    for case, timings in by_case(result).items():
        parts.append(f"**{case}**")
        parts.append(grid(columns(timings), rows(timings), bold=OURS))
        verdicts = [f"- {v.sentence()}" for v in result.verdicts if v.case == case]
        if verdicts:
            parts.append("\n".join(verdicts))
    return "\n\n".join(parts)


def _gpu_markdown(name: str) -> str:
    from benchmarks.registry import BENCHMARKS

    rows = []
    for case in BENCHMARKS[name]("cuda"):
        for target in case.targets:
            words = target.bound()
            if target.over:
                words += f" times {'faster than' if target.at_least is not None else 'the time of'} {target.over}"
            rows.append([case.name, words, "not measured"])
    command = f"python -m benchmarks {name} --device cuda --memory --json benchmarks/results/cuda/{name}.json"
    return "\n\n".join([
        f"### `{name}` on an H200: not measured",
        f"No GPU was at hand; `{command}` fills this in, every peer in the same run.",
        grid(("work", "target", "measured"), rows),
    ])  # fmt: skip


def grid(columns: Iterable[str], rows: Iterable[list[str]], bold: str = "") -> str:
    """A Markdown table: first column to the left, the others to the right; the row whose first cell is `bold` is."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for row in rows:
        shown = [f"**{cell}**" if cell and row[0] == bold else cell for cell in row]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- name:begin -->` and `<!-- name:end -->`; ValueError where they are missing."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text()
    head, found_begin, rest = old.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{path} has no lines {begin!r} and {end!r} for the tables to stand between")
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
