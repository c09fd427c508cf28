"""The pictures of the claims, in the trainer's own style: stacked bars, points a seed, curves of reward against KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_trainer.plots import BLUE, GREEN, INK, ORANGE, PURPLE, QUIET, RED, SIZE, STYLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
LINES = {  # estimator -> colour and dashes
    "none": (INK, "-"), "kl": (BLUE, "-"), "clamped_kl": (BLUE, ":"), "full_kl": (BLUE, "--"),
    "squared_error": (ORANGE, "-"), "bregman": (GREEN, "-"), "jensen_shannon": (PURPLE, "-"), "full_js": (PURPLE, "--"),
}  # fmt: skip
DPI = 110

Panel = tuple[str, Sequence[str], Mapping[str, Sequence[float]]]  # title, bars' names, stacked parts


def bars(panels: Sequence[Panel], unit: str, path: Path) -> None:
    """Stacked bars lying down, a panel each, their sums at the ends."""
    plt = _pyplot()
    most = max(len(names) for _, names, _ in panels)
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        size = (SIZE[0] * min(len(panels), 2) * 0.75, 1.3 + 0.42 * most)
        figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for (title, names, parts), ax in zip(panels, axes[0]):
            left = [0.0] * len(names)
            for (part, widths), colour in zip(parts.items(), COLOURS):
                ax.barh(names, widths, left=left, color=colour, label=part, height=0.62)
                left = [a + b for a, b in zip(left, widths)]
            for place, total in enumerate(left):
                ax.text(total, place, f" {total:,.0f}", va="center", fontsize=8.5, color=INK)
            ax.set(title=title, xlabel=unit, xlim=(0, 1.16 * max(left)))
            ax.invert_yaxis()
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4)
        _save(figure, path)


def points(columns: Mapping[str, Sequence[float]], unit: str, path: Path) -> None:
    """A column a name: its values as points, their mean as a line."""
    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=SIZE, layout="constrained")
        for place, values in enumerate(columns.values()):
            colour = QUIET if place == 0 else BLUE
            mean = sum(values) / len(values)
            ax.plot([place] * len(values), values, "o", color=colour, alpha=0.6)
            ax.plot([place - 0.25, place + 0.25], [mean, mean], color=colour, linewidth=2.4)
            ax.text(place + 0.29, mean, f"{mean:.1f}", va="center", fontsize=8.5, color=INK)
        ax.set_xticks(range(len(columns)), list(columns))
        ax.set(ylabel=unit, xlim=(-0.5, len(columns) - 0.2), title="Each seed, and the mean")
        _save(figure, path)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    ends: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
) -> None:
    """Left: reward against KL as training goes on, smoothed; right: held-out gold against KL at the end, by seed."""
    from rlhf_trainer.plots import smooth

    plt = _pyplot()
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(1.5 * SIZE[0], 1.1 * SIZE[1]), layout="constrained")
        for name, line in lines.items():
            colour, dashes = LINES.get(name, (RED, "-"))
            kl, reward = (smooth(list(values))[0] for values in zip(*line))
            left.plot(kl, reward, dashes, color=colour, linewidth=1.7, label=name)
            x, y = (list(values) for values in zip(*ends[name]))
            filled = {"markerfacecolor": "white"} if dashes != "-" else {}
            right.plot(x, y, "o", color=colour, alpha=0.45, markersize=4, **filled)
            middle = sum(x) / len(x), sum(y) / len(y)
            right.plot(*middle, "D", color=colour, markersize=7, **filled)
            right.annotate(name, middle, xytext=(7, 4), textcoords="offset points", fontsize=8, color=colour)
        left.set(title="During training: reward model", xlabel="KL, nats a completion", ylabel="mean score")
        right.set(title="At the end: held-out gold", xlabel="KL, nats a completion", ylabel="points")
        left.legend(fontsize=8, ncols=2)
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    _pyplot().close(figure)


def _pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
