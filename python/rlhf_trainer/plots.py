"""The figures of a run, from its metrics alone: one panel a question, a smoothed line over the raw points, units named.

`draw(history)` gives matplotlib figures by name; `save` writes them as PNG files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = list[dict[str, Any]]  # one dict a step, in order, each with "step"

INK, QUIET, GRID = "#1f2430", "#6b7280", "#e5e7eb"
BLUE, GREEN, ORANGE, PURPLE, RED = "#2563eb", "#059669", "#d97706", "#7c3aed", "#dc2626"
SIZE = (7.2, 3.6)  # inches, at 144 dots each: 1037 x 518 pixels
DPI = 144
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.14,
    "figure.constrained_layout.h_pad": 0.14,
    "savefig.dpi": DPI,
}


def series(history: History, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was logged and finite."""
    found = [(row["step"], row[name]) for row in history if isinstance(row.get(name), int | float)]
    return [step for step, _ in found], [float(value) for _, value in found]


def smooth(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """A centred moving mean and standard deviation over about a tenth of the run, at least three points."""
    reach = max(1, len(values) // 20)
    means, spreads = [], []
    for i in range(len(values)):
        near = values[max(0, i - reach) : i + reach + 1]
        mean = sum(near) / len(near)
        means.append(mean)
        spreads.append((sum((v - mean) ** 2 for v in near) / len(near)) ** 0.5)
    return means, spreads


def draw(history: History) -> "dict[str, Figure]":
    """Figures by name, in reading order; only those the run has data for."""
    panels: dict[str, Callable[[History], Figure | None]] = {
        "loss": _loss,
        "accuracy": _accuracy,
        "reward": _reward,
        "kl": _kl,
        "length": _length,
        "timing": _timing,
        "memory": _memory,
    }
    drawn = {name: make(history) for name, make in panels.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save(history: History, folder: Path) -> dict[str, Path]:
    """Write every figure as `folder/NAME.png`; the paths by name."""
    return write(lambda: draw(history), folder)


def write(make: "Callable[[], dict[str, Figure]]", folder: Path) -> dict[str, Path]:
    """Write the figures that `make` draws as `folder/NAME.png`; the paths by name."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in make().items():
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name], dpi=DPI)
    return paths


def panel(title: str, unit: str) -> "tuple[Figure, Axes]":
    """An empty figure over the steps of a run, in this module's style."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit, labelpad=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.015)
    return figure, axes


def _curve(axes: "Axes", history: History, name: str, color: str, label: str) -> bool:
    """Raw points faint, their moving mean as a line, one standard deviation around it as a band."""
    steps, values = series(history, name)
    if not steps:
        return False
    mean, spread = smooth(values)
    many = len(steps) >= 8
    if many:
        low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)
    axes.plot(
        steps, values, ".", color=color, alpha=0.35 if many else 1, markersize=5 if many else 7, markeredgewidth=0
    )
    axes.plot(steps, mean if many else values, color=color, linewidth=2, label=label, solid_capstyle="round")
    return True


def finish(axes: "Axes") -> None:
    """A legend above the axes, at the right, where more than one thing is drawn."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.2, handlelength=1.4)


def _single(history: History, name: str, title: str, unit: str, color: str) -> "Figure | None":
    if not series(history, name)[0]:
        return None
    figure, axes = panel(title, unit)
    _curve(axes, history, name, color, title)
    return figure


def _loss(history: History) -> "Figure | None":
    if series(history, "reward")[0]:
        return None  # the loss of a policy gradient is no measure of progress
    return _single(history, "loss", "Loss", "nats", BLUE)


def _accuracy(history: History) -> "Figure | None":
    name = next((n for n in ("accuracy", "reward/accuracy", "rewards/accuracies") if series(history, n)[0]), "")
    figure = _single(history, name, "Preferred completion scored higher", "share of pairs", GREEN) if name else None
    if figure is not None:
        figure.axes[0].axhline(0.5, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        figure.axes[0].set_ylim(top=1.02)
    return figure


def _reward(history: History) -> "Figure | None":
    name = "reward" if series(history, "reward")[0] else "objective/scores"
    steps, values = series(history, "eval/reward")
    if not steps and not series(history, name)[0]:
        return None
    figure, axes = panel("Reward", "mean score of a completion")
    _curve(axes, history, name, BLUE, "rollouts")
    if steps:
        axes.plot(steps, values, "o-", color=ORANGE, markersize=5, linewidth=1.4, label="held-out prompts")
    finish(axes)
    return figure


def _kl(history: History) -> "Figure | None":
    figure = _single(history, "objective/kl", "Divergence from the reference", "nats a completion", PURPLE)
    if figure is not None:
        figure.axes[0].axhline(0, color=QUIET, linewidth=1)
    return figure


def _length(history: History) -> "Figure | None":
    figure = _single(history, "completions/mean_length", "Length of completions", "tokens, mean", GREEN)
    if figure is not None:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def _timing(history: History) -> "Figure | None":
    parts = [("generate", "#5b8def"), ("score", "#f0b45b"), ("update", "#57b894")]
    rows = [r for r in history if any(isinstance(r.get(f"timing/{p}"), int | float) for p, _ in parts)]
    if not rows:
        return None
    figure, axes = panel("Where a step's time goes", "seconds")
    steps = [r["step"] for r in rows]
    present = [(p, c) for p, c in parts if any(f"timing/{p}" in r for r in rows)]
    stacks = [[float(r.get(f"timing/{p}") or 0.0) for r in rows] for p, _ in present]
    if len(rows) <= 40:
        bottom = [0.0] * len(rows)
        for (part, color), values in zip(present, stacks):
            axes.bar(steps, values, width=0.82, bottom=bottom, color=color, label=part, linewidth=0)
            bottom = [b + v for b, v in zip(bottom, values)]
    else:
        axes.stackplot(steps, *stacks, colors=[c for _, c in present], labels=[p for p, _ in present], linewidth=0)
    axes.set_ylim(bottom=0)
    finish(axes)
    return figure


def _memory(history: History) -> "Figure | None":
    drawn = [("memory/peak", RED, "process, peak so far"), ("memory/kv_peak", BLUE, "KV slices, peak of the rollout")]
    drawn = [d for d in drawn if series(history, d[0])[0]]
    if not drawn:
        return None
    top = max(max(series(history, name)[1]) for name, _, _ in drawn)
    unit, size = ("GiB", 2**30) if top >= 2**30 else ("MiB", 2**20)
    figure, axes = panel("Memory", unit)
    for name, color, label in drawn:
        steps, values = series(history, name)
        axes.plot(steps, [v / size for v in values], color=color, linewidth=2, label=label, solid_capstyle="round")
        axes.annotate(
            f"{values[-1] / size:,.3g} {unit}", (steps[-1], values[-1] / size),
            xytext=(-4, 6), textcoords="offset points", ha="right", color=color, fontsize=9,
        )  # fmt: skip
    axes.set_ylim(0, 1.15 * top / size)
    finish(axes)
    return figure
