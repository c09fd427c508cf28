"""`report.html` and its figures, from `metrics.jsonl`, `samples.jsonl` and `config.yaml` alone, so it can be made anew.

One self-contained page: what ran, how far it got, the curves, and completions before and after. The run may have ended,
been interrupted or still be going.
"""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .config import read_yaml
from .errors import UserError
from .metrics import METRICS, SAMPLES, read_lines
from .plots import History, save, series

FIRST, LAST = 0.1, 0.1  # shares of the run whose means stand for its beginning and its end

SUMMARY = (  # metric, its name for a reader, its format
    ("loss", "loss", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("reward", "reward", "{:+.3f}"),
    ("eval/reward", "reward, held-out prompts", "{:+.3f}"),
    ("objective/kl", "KL to the reference (nats a completion)", "{:.3f}"),
    ("completions/mean_length", "length (tokens)", "{:.1f}"),
    ("completions/clipped_ratio", "completions cut at the limit", "{:.0%}"),
    ("sampling/tokens_per_second", "generation (tokens/s)", "{:,.0f}"),
    ("timing/generate", "generate (s a step)", "{:.2f}"),
    ("timing/score", "score (s a step)", "{:.2f}"),
    ("timing/update", "update (s a step)", "{:.2f}"),
)

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f2430; margin: 0; }
body { background: #f6f7f9; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 12px; }
.about { color: #6b7280; margin: 4px 0 24px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 16px; }
.card, table { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; }
.card { padding: 10px; } .card img { width: 100%; display: block; }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 9px 14px; border-top: 1px solid #eef0f3; }
tr:first-child th { border-top: 0; color: #6b7280; font-weight: 600; font-size: 13px; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.option { overflow-wrap: anywhere; min-width: 110px; font-size: 13px; } .wide { overflow-x: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.text b { color: #6b7280; font-weight: 400; }
.reward { display: inline-block; margin-bottom: 4px; padding: 0 8px; border-radius: 9px; }
.reward { font-size: 12px; background: #eef2ff; }
details pre { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; padding: 14px; overflow-x: auto; }
"""


@dataclass(frozen=True)
class Run:
    """What a run's folder says: `history` has one dict a step, `config` is its config.yaml ("" and {} without one)."""

    folder: Path
    history: History
    config: dict[str, Any]
    config_text: str

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algorithm", "run"))

    @property
    def progress(self) -> str:
        """ "70 steps", or "37 of 70 steps" of a run that has not come to its end."""
        done, total = self.history[-1]["step"], self.config.get("total_steps")
        return f"{done} of {total} steps" if isinstance(total, int) and done < total else f"{done} steps"


def read_run(folder: str | Path) -> Run:
    """The record of a run, which may still be written. UserError if there are no metrics, naming runs below it."""
    folder = Path(folder)
    if folder.name == METRICS:
        folder = folder.parent
    history = merge_steps(read_lines(folder / METRICS))
    if not history:
        below = sorted(str(path.parent) for path in folder.glob(f"*/{METRICS}"))
        hint = f"; there are runs in {', '.join(below)}" if below else ""
        raise UserError(f"report: {str(folder / METRICS)!r} holds no metrics yet{hint}")
    recorded = folder / "config.yaml"
    text = recorded.read_text(encoding="utf-8") if recorded.exists() else ""
    return Run(folder, history, read_yaml(recorded) if text else {}, text)


def write_report(output_dir: str | Path, target: str | Path | None = None) -> Path:
    """Write `plots/*.png` and `report.html` into a run's folder, or into `target`; the page's path.

    UserError if the run has no metrics.
    """
    run = read_run(output_dir)
    folder = run.folder if target is None else Path(target)
    figures = save(run.history, folder / "plots")
    return write_page(folder, render(run, figures, list(read_lines(run.folder / SAMPLES))))


def write_page(folder: Path, page: str) -> Path:
    """`folder/report.html`, whole or not at all."""
    path = folder / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def merge_steps(rows: Any) -> History:
    """One dict a step, in order: a step may be logged in several lines, such as its training and its evaluation."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        if isinstance(row.get("step"), int):
            merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def render(run: Run, figures: dict[str, Path], samples: list[dict[str, Any]]) -> str:
    """The page's HTML; every text from the run is escaped."""
    parts = [
        f"<h1>{escape(run.algorithm)}</h1>",
        f'<p class="about">{run.progress}{_duration(run.history)}</p>',
        grid(figures),
        "<h2>Beginning and end</h2>" + _summary(run.history),
        _samples(samples),
    ]
    if run.config_text:
        parts.append(
            f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
        )
    return html(f"{run.algorithm}: {run.progress}", parts)


def html(title: str, parts: list[str]) -> str:
    """A self-contained page."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def grid(figures: dict[str, Path]) -> str:
    """The pictures side by side, inside the page."""
    return '<div class="grid">' + "".join(_figure(name, path) for name, path in figures.items()) + "</div>"


def ends(history: History, name: str) -> tuple[float, float] | None:
    """Means of a metric over the first and the last tenth of a run's steps; None where it was not logged."""
    values = series(history, name)[1]
    if not values:
        return None
    first, last = values[: max(1, round(FIRST * len(values)))], values[-max(1, round(LAST * len(values))) :]
    return sum(first) / len(first), sum(last) / len(last)


def _duration(history: History) -> str:
    seconds = sum(float(r.get(f"timing/{p}") or 0) for r in history for p in ("generate", "score", "update"))
    if not seconds:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f", {minutes} min {rest:02d} s of generating, scoring and updating"


def _figure(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<div class="card"><img alt="{escape(name)}" src="data:image/png;base64,{data}"></div>'


def _summary(history: History) -> str:
    rows = ['<tr><th></th><th class="number">first steps</th><th class="number">last steps</th></tr>']
    for name, label, form in SUMMARY:
        if (means := ends(history, name)) is not None:
            cells = "".join(f'<td class="number">{form.format(mean)}</td>' for mean in means)
            rows.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"


def _samples(samples: list[dict[str, Any]]) -> str:
    """The first and the last recorded completions: side by side where the prompts are the same."""
    if not samples:
        return ""
    steps = sorted({row["step"] for row in samples})
    before, after = ([r for r in samples if r["step"] == step] for step in (steps[0], steps[-1]))
    if len(steps) == 1:
        cells = "".join(f"<tr><td>{_completion(row)}</td></tr>" for row in before)
        return f"<h2>Completions</h2><table><tr><th>step {steps[0]}</th></tr>{cells}</table>"
    by_prompt = {row.get("prompt"): row for row in after}
    if all(row.get("prompt") in by_prompt for row in before):
        after = [by_prompt[row.get("prompt")] for row in before]
    blank: dict[str, Any] = {}
    count = max(len(before), len(after))
    pairs = zip(before + [blank] * (count - len(before)), after + [blank] * (count - len(after)))
    cells = "".join(f"<tr><td>{_completion(b)}</td><td>{_completion(a)}</td></tr>" for b, a in pairs)
    header = "".join(f'<th style="width: 50%">step {step}</th>' for step in (steps[0], steps[-1]))
    return f"<h2>Completions before and after</h2><table><tr>{header}</tr>{cells}</table>"


def _completion(row: dict[str, Any]) -> str:
    if not row:
        return ""
    reward = row.get("reward")
    badge = f'<span class="reward">reward {reward:+.2f}</span><br>' if isinstance(reward, int | float) else ""
    prompt, completion = (escape(str(row.get(k, ""))) for k in ("prompt", "completion"))
    return f'{badge}<span class="text"><b>{prompt}</b>{completion}</span>'
