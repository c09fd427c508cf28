"""Every algorithm over several seeds: rises of the gold score and the controls, as JSON and as a table.

    rlhf-train demo --seeds 3 --algorithms all --output runs/seeds

A seed covers the whole pipeline: its Hydra-SFT model, the rollouts, the updates. Results are written after each run,
so that an interrupted study keeps what it has.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_trainer.demo.evaluate import Comparison
from rlhf_trainer.demo.run import train_base, train_policy
from rlhf_trainer.demo.settings import least_rise

RESULTS = "seeds.json"
SHOWN = ("rise", "length_control", "distinct_ratio", "nll_rise", "seconds")


def study(algorithms: Sequence[str], seeds: int, output: Path) -> int:
    """Train and compare; 0 when every algorithm's means are as they should be, else 1."""
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        base = output / f"seed-{seed}" / "hydra-sft"
        train_base(base, seed)
        for algorithm in algorithms:
            started = time.perf_counter()
            _, _, result = train_policy(algorithm, base, base.parent / algorithm, seed, report=False)
            seconds = time.perf_counter() - started
            rows.append({"algorithm": algorithm, "seed": seed, "seconds": seconds, **result.as_dict()})
            (output / RESULTS).write_text(json.dumps({"runs": rows, "means": means(rows)}, indent=2) + "\n")
            print(f"{algorithm}, seed {seed}: rise {result.rise:+.2f} in {seconds:.0f} s", flush=True)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table(rows))
    return 0 if all(passed(name, mean) for name, mean in means(rows).items()) else 1


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """algorithm -> the mean over its seeds of everything measured."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        mine = [row for row in rows if row["algorithm"] == name]
        keys = [k for k in mine[0] if k not in ("algorithm", "seed")]
        found[name] = {key: fmean(row[key] for row in mine) for key in keys}
    return found


def passed(algorithm: str, mean: dict[str, float]) -> bool:
    """The limits of one run, for the means."""
    values = {field.name: mean[field.name] for field in fields(Comparison)}
    return Comparison(**values).passed(least_rise(algorithm))


def table(rows: list[dict[str, Any]]) -> Table:
    """A line an algorithm: the mean, and each seed's value where it is the rise."""
    found = Table(title="Gold score on held-out prompts", title_justify="left", title_style="bold")
    for name in ("", "rise (std. dev.)", "each seed", "length alone", "distinct pairs", "nats a token", "s a run", ""):
        found.add_column(name, justify="left" if name == "" else "right")
    for algorithm, mean in means(rows).items():
        each = "  ".join(f"{row['rise']:+.2f}" for row in rows if row["algorithm"] == algorithm)
        rise, length, distinct, nll, seconds = (mean[name] for name in SHOWN)
        cells = (f"{rise:+.2f}", each, f"{length:+.2f}", f"x {distinct:.2f}", f"{nll:+.2f}", f"{seconds:.0f}")
        found.add_row(algorithm, *cells, "[green]yes[/green]" if passed(algorithm, mean) else "[bold red]NO[/bold red]")
    return found
