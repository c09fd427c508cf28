"""Several runs in one picture: `compare` draws each metric of all of them over the steps and says where they differ.

One self-contained page: curves by run, reward against KL, the ends of every run, and the options that are not the same.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .errors import UserError
from .plots import QUIET, History, finish, panel, series, smooth, write
from .report import SUMMARY, Run, ends, grid, html, read_run, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#dc2626", "#0891b2", "#be185d", "#65a30d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # a colour's second and third run
MOST = len(COLORS) * len(DASHES)
FEW = 8  # values are drawn as they are where they are fewer
BAND = 4  # with more runs than this the bands of scatter would hide each other

PANELS = (  # file, metrics it may come from, title, unit; a run is drawn by the first that it has
    ("loss", ("loss",), "Loss", "nats"),
    ("accuracy", ("accuracy", "reward/accuracy", "rewards/accuracies"), "Preferred scored higher", "share of pairs"),
    ("reward", ("reward", "objective/scores"), "Reward of rollouts", "mean score of a completion"),
    ("eval_reward", ("eval/reward",), "Reward of held-out prompts", "mean score of a completion"),
    ("kl", ("objective/kl",), "Divergence from the reference", "nats a completion"),
    ("length", ("completions/mean_length",), "Length of completions", "tokens, mean"),
)
PARTS = ("generate", "score", "update")
SAME = {
    "output_dir",
    "resume",
    "report",
    "report_to",
    "save_steps",
    "save_total_limit",
    "logging_steps",
}  # not compared


def compare(folders: Sequence[str | Path], target: str | Path) -> Path:
    """Write `plots/*.png` and `report.html` of all runs into `target`; the page's path.

    UserError if one of them has no metrics, one is given twice, or `target` is one of them.
    """
    runs = [read_run(folder) for folder in folders]
    places = [run.folder.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise UserError(f"report: a run is given twice: {', '.join(map(str, folders))}")
    if len(runs) > MOST:
        raise UserError(f"report: {len(runs)} runs; {MOST} can be told apart")
    target = Path(target)
    if target.resolve() in places:
        raise UserError(f"report: --output {str(target)!r} is one of the runs; its own report would be lost")
    named = dict(zip(names(places), runs))
    figures = write(lambda: draw(named), target / "plots")
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        '<p class="about">'
        + "<br>".join(f"{escape(n)}: {r.algorithm}, {r.progress}" for n, r in named.items())
        + "</p>",
        grid(figures),
        "<h2>Last steps</h2>" + _ends(named),
        _differences(named),
    ]
    return write_page(target, html(", ".join(named), parts))


def names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    for parts in range(1, max(len(place.parts) for place in places)):
        short = [os.sep.join(place.parts[-parts:]) for place in places]
        if len(set(short)) == len(short):
            return short
    return [str(place) for place in places]


def draw(runs: dict[str, Run]) -> "dict[str, Figure]":
    """A figure a metric, with a line a run; only those that some run has data for."""
    figures = {}
    policies = any(series(run.history, "reward")[0] for run in runs.values())
    for file, metrics, title, unit in PANELS:
        if file == "loss" and policies:
            continue  # of a policy gradient it is no measure of progress
        figure, axes = panel(title, unit)
        for (name, run), look in zip(runs.items(), _looks()):
            metric = next((m for m in metrics if series(run.history, m)[0]), None)
            if metric is None:
                continue
            steps, values = series(run.history, metric)
            few = file == "eval_reward" or len(steps) < FEW
            mean, spread = (values, [0.0] * len(values)) if few else smooth(values)
            if len(runs) <= BAND and not few:
                low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color=look["color"], alpha=0.1, linewidth=0)
            axes.plot(steps, mean, linewidth=2, label=name, marker="o" if few else None, markersize=5, **look)
        if not axes.lines:
            continue
        if file == "kl":
            axes.axhline(0, color=QUIET, linewidth=1)
        _legend(axes, len(runs))
        figures[file] = figure
    against = {
        "reward_by_kl": _reward_against(runs, "divergence", "nats a completion from the reference", _kl),
        "reward_by_time": _reward_against(runs, "time", "seconds of generating, scoring and updating", _seconds),
    }
    return figures | {file: figure for file, figure in against.items() if figure is not None}


def _reward_against(
    runs: dict[str, Run], what: str, unit: str, place: Callable[[History], list[float]]
) -> "Figure | None":
    """Smoothed reward over something other than steps; a dot where a run is now."""
    figure, axes = panel(f"Reward against {what}", "mean score of a completion")
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(_ticks())
    for (name, run), look in zip(runs.items(), _looks()):
        rows = [row for row in run.history if series([row], "reward")[0]]
        places = place(rows)
        if len(rows) < 2 or len(places) < len(rows):
            continue
        reward = _smoothed(rows, "reward")
        axes.plot(places, reward, linewidth=1.8, label=name, **look)
        axes.plot(places[-1:], reward[-1:], "o", color=look["color"], markersize=6)
    if not axes.lines:
        return None
    _legend(axes, len(runs))
    return figure


def _smoothed(rows: History, metric: str) -> list[float]:
    values = series(rows, metric)[1]
    return values if len(values) < FEW else smooth(values)[0]


def _kl(rows: History) -> list[float]:
    return _smoothed(rows, "objective/kl")


def _seconds(rows: History) -> list[float]:
    """Since the start of the run, at the end of each step; [] where it was not measured."""
    steps = [sum(float(row.get(f"timing/{part}") or 0) for part in PARTS) for row in rows]
    return list(accumulate(steps)) if all(steps) else []


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=9, steps=[1, 2, 5, 10])


def _looks() -> list[dict[str, Any]]:
    """Colour and line of each run in turn."""
    return [{"color": color, "linestyle": dash} for dash in DASHES for color in COLORS]


def _legend(axes: Any, runs: int) -> None:
    """Above the axes where it has room there, else below them."""
    labels = axes.get_legend_handles_labels()[1]
    if runs <= 4 and sum(map(len, labels)) <= 44:
        finish(axes)
    else:
        columns = max(1, min(4, 88 // (max(map(len, labels)) + 5)))
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.2 + 0.19 * -(-len(labels) // columns))  # inches
        axes.figure.legend(loc="outside lower center", ncols=columns, handlelength=1.8)


def _ends(runs: dict[str, Run]) -> str:
    rows = [_row("steps", [str(run.history[-1]["step"]) for run in runs.values()], "number")]
    for metric, label, form in SUMMARY:
        means = [ends(run.history, metric) for run in runs.values()]
        if any(mean is not None for mean in means):
            rows.append(_row(label, ["" if mean is None else form.format(mean[1]) for mean in means], "number"))
    return _table(runs, rows, "number")


def _differences(runs: dict[str, Run]) -> str:
    """The options in which the runs' config.yaml differ; one that an older file lacks had its default."""
    defaults = asdict(TrainConfig())
    keys = dict.fromkeys(key for run in runs.values() for key in run.config if key not in SAME)
    rows = []
    for key in keys:
        values = [str(run.config.get(key, defaults.get(key))) if run.config else "" for run in runs.values()]
        if len(set(values)) > 1:
            rows.append(_row(key, values, "option"))
    return f"<h2>Options that differ</h2>{_table(runs, rows, 'option')}" if rows else ""


def _table(runs: dict[str, Run], rows: list[str], kind: str) -> str:
    header = "".join(f'<th class="{kind}">{escape(name)}</th>' for name in runs)
    return f'<div class="wide"><table><tr><th></th>{header}</tr>{"".join(rows)}</table></div>'


def _row(label: str, values: Sequence[str], kind: str) -> str:
    cells = "".join(f'<td class="{kind}">{escape(value)}</td>' for value in values)
    return f"<tr><td>{escape(label)}</td>{cells}</tr>"
