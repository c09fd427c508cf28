"""What the demo prints and draws: tables for the terminal (rich) and two figures (matplotlib)."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from rlhf_trainer.demo.evaluate import LEAST_DISTINCT, LENGTH_LIMIT, NLL_LIMIT, Comparison, Sampled
from rlhf_trainer.demo.settings import least_rise
from rlhf_trainer.plots import BLUE, INK, ORANGE, QUIET, SIZE, STYLE

if TYPE_CHECKING:
    from rlhf_kernels.memory import Plan
    from rlhf_trainer.demo.measure import Measured

MIB = 2**20
SUCCESSES, FAILURES = 5, 3


def comparison_table(algorithm: str, result: Comparison) -> Table:
    """Before and after with the controls and their limits."""
    table = Table(title=f"{algorithm} on 256 held-out prompts", title_justify="left", title_style="bold")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    rise, least = result.gold_after - result.gold_before, least_rise(algorithm)
    reward_rise = result.reward_after - result.reward_before
    rows = (
        ("gold score (points)", f"{result.gold_before:.1f}", f"{result.gold_after:.1f}", f"{rise:+.1f}", ""),
        (
            "  in standard deviations",
            "",
            "",
            f"{result.rise:+.2f}",
            verdict(result.rise >= least, f"at least {least:+.2f}"),
        ),
        ("reward model", f"{result.reward_before:.2f}", f"{result.reward_after:.2f}", f"{reward_rise:+.2f}", ""),
        ("tokens", f"{result.tokens_before:.1f}", f"{result.tokens_after:.1f}", "", ""),
        ("ended by themselves", f"{result.ended_before:.0%}", f"{result.ended_after:.0%}", "", ""),
    )
    for row in rows:
        table.add_row(*row)
    table.add_section()
    control, distinct, nll = result.length_control, result.distinct_ratio, result.nll_rise
    limits = (
        ("length alone (std. dev.)", f"{control:+.2f}", control < LENGTH_LIMIT, f"below {LENGTH_LIMIT:+.2f}"),
        ("distinct word pairs", f"x {distinct:.2f}", distinct >= LEAST_DISTINCT, f"at least x {LEAST_DISTINCT:.2f}"),
        ("nats a token under SFT", f"{nll:+.2f}", nll <= NLL_LIMIT, f"at most {NLL_LIMIT:+.2f}"),
    )
    for name, change, good, limit in limits:
        table.add_row(name, "", "", change, verdict(good, limit))
    return table


def verdict(good: bool, limit: str) -> Text:
    return Text(("yes, " if good else "NO, ") + limit, style="green" if good else "bold red")


def completions_table(before: Sampled, after: Sampled) -> Table:
    """The first prompts whose gold score rose, and the three whose score fell most."""
    gains = [b - a for a, b in zip(before.gold, after.gold)]
    risen = [i for i, gain in enumerate(gains) if gain > 0][:SUCCESSES]
    fallen = sorted(range(len(gains)), key=lambda i: gains[i])[:FAILURES]
    table = Table(title="Completions", title_justify="left", title_style="bold", show_lines=True)
    table.add_column("prompt", style="cyan", ratio=2)
    table.add_column("before", ratio=4)
    table.add_column("after", ratio=4)
    table.add_column("gold", justify="right", no_wrap=True)
    for title, chosen in ((f"first {len(risen)} that rose", risen), (f"the {len(fallen)} that fell most", fallen)):
        table.add_row(Text(title, style="bold"), "", "", "")
        for i in chosen:
            points = f"{before.gold[i]:.0f} to {after.gold[i]:.0f}"
            table.add_row(*(Text(t) for t in (before.prompts[i], before.texts[i], after.texts[i], points)))
    return table


def memory_table(rows: Iterable[tuple["Plan", "Measured"]]) -> Table:
    """Planned beside measured, an algorithm a line."""
    table = Table(title="Memory (MiB) and time", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("static planned", "measured", "peak planned", "measured", "ms/sample"):
        table.add_column(name, justify="right")
    for plan, got in rows:
        table.add_row(
            got.algorithm,
            f"{plan.static / MIB:.2f}",
            f"{got.static_bytes / MIB:.2f}",
            f"{plan.total / MIB:.0f}",
            f"{got.peak_bytes / MIB:.0f}",
            f"{1000 * got.seconds_per_sample:.1f}",
        )
    return table


def draw_gold(before: Sampled, after: Sampled, path: Path) -> None:
    """Histogram of the gold scores before and after."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        low, high = min(before.gold + after.gold), max(before.gold + after.gold)
        bins = [low + (high - low) * i / 28 for i in range(29)]
        for sample, name, colour in ((before, "before", QUIET), (after, "after", BLUE)):
            mean = sum(sample.gold) / len(sample.gold)
            axes.hist(sample.gold, bins, color=colour, alpha=0.55, label=f"{name}: mean {mean:.1f}")
            axes.axvline(mean, color=colour, linewidth=1.8)
        axes.set(title="Gold score of 256 held-out prompts", xlabel="points", ylabel="completions")
        axes.legend()
        figure.savefig(path)
        plt.close(figure)


def draw_memory(rows: list[tuple["Plan", "Measured"]], path: Path) -> None:
    """Static bytes, planned and measured, side by side."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        names = [got.algorithm for _, got in rows]
        places = range(len(rows))
        values = (
            ("planned", [plan.static / MIB for plan, _ in rows], QUIET, -0.19),
            ("measured", [got.static_bytes / MIB for _, got in rows], ORANGE, 0.19),
        )
        for name, heights, colour, shift in values:
            bars = axes.bar([x + shift for x in places], heights, 0.36, color=colour, label=name)
            axes.bar_label(bars, fmt="%.1f", padding=2, color=INK, fontsize=8)
        axes.set_xticks(list(places), names)
        axes.set(title="Weights, gradients and optimiser state", ylabel="MiB")
        axes.legend()
        figure.savefig(path)
        plt.close(figure)


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
