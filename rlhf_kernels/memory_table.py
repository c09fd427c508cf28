"""A memory plan as text: aligned columns."""

from typing import TYPE_CHECKING

from rlhf_kernels.memory_size import format_bytes

if TYPE_CHECKING:
    from rlhf_kernels.memory import Plan
    from rlhf_kernels.memory_static import PlanRow


def table(plan: "Plan") -> str:
    """A line a part, with weights, gradients, optimiser state and their sum; then the phases and their peaks."""
    lines = [
        (r.name, *(format_bytes(v) for v in (r.weights, r.gradients, r.optimizer)), _estimate(r))
        for r in plan.rows
        if r.phase == "static"
    ]
    sums = [sum(getattr(r, k) for r in plan.rows) for k in ("weights", "gradients", "optimizer")]
    lines.append(("static", *map(format_bytes, sums), format_bytes(plan.static)))
    first = len(lines)
    for phase, peak in plan.peaks.items():
        mark = " <- the peak" if phase == plan.phase else ""
        lines.append((phase, "", "", "", "~" + format_bytes(peak) + mark))
        lines += [("  " + r.name, "", "", "", _estimate(r)) for r in plan.rows if r.phase == phase and r.bytes]
    head = ("", "weights", "gradients", "optimiser", "bytes")
    text = plan.title + "\n" + columns(head, lines, rules=(first - 1, first))
    if plan.budget is not None:
        text += f"\nbudget {format_bytes(plan.budget)}: largest batch {plan.largest_batch}"
    return text


def columns(header: tuple[str, ...], lines: list[tuple[str, ...]], rules: tuple[int, ...] = ()) -> str:
    """Aligned text columns, the first to the left; a rule under the header and before the lines numbered in `rules`."""
    arrow = " <- "
    sized = [tuple(cell.partition(arrow)[0] for cell in line) for line in [header, *lines]]
    widths = [max(len(line[i]) for line in sized) for i in range(len(header))]

    def text(line: tuple[str, ...]) -> str:
        cells = [line[0].ljust(widths[0])]
        for cell, width in zip(line[1:], widths[1:]):
            value, found, rest = cell.partition(arrow)
            cells.append(value.rjust(width) + found + rest)
        return "  ".join(cells).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    result = [text(header), rule]
    for number, line in enumerate(lines):
        result += [rule] if number in rules else []
        result.append(text(line))
    return "\n".join(result)


def _estimate(row: "PlanRow") -> str:
    return ("" if row.exact else "~") + format_bytes(row.bytes)
