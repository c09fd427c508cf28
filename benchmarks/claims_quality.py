"""Held-out gold of every layout on the demo task, over seeds: Hydra-PPO keeps the quality of LoRA-PPO."""

from pathlib import Path

from benchmarks.claims_demo import grouped, spread, told
from benchmarks.claims_record import Claim, Data, Part
from benchmarks.claims_scale import Scale, Workshop
from benchmarks.tables import grid

METHODS = ("ppo", "lora-ppo", "j-hydra-ppo", "hydra-ppo", "remax")


def measure(scale: Scale, workshop: Workshop) -> Data:
    return {"rows": workshop.runs.get([(name, "kl") for name in METHODS])}


def markdown(data: Data) -> str:
    methods = grouped(data["rows"], "algorithm")
    seeds = len(next(iter(methods.values())))
    first = next(iter(methods.values()))
    rows = []
    for name, mine in methods.items():
        cells = [name, told(mine, "gold_after"), " ".join(f"{row['gold_after']:.1f}" for row in mine)]
        cells += [told(mine, "rise", 2), told(mine, "win_rate", 1, 100), told(mine, "kl", 2)]
        cells += [told(mine, "length_control", 2), told(mine, "distinct_ratio", 2), told(mine, "nll_rise", 2)]
        rows.append([*cells, f"{sum(row['passed'] for row in mine)} of {len(mine)}"])
    names = (
        "", "gold, held out", "each seed", "rise (std. dev.)", "win % over SFT", "KL (nats)", "length alone",
        "distinct pairs", "nats a token under SFT", "controls passed",
    )  # fmt: skip
    text = (
        f"The demo task over {seeds} seeds, each with its own Hydra-SFT model (gold {told(first, 'gold_before')}): "
        f"mean and standard deviation over the seeds. Each method has the demo's own settings: learning rate, steps "
        f"and weight of the penalty were tuned apart: the table says what each can reach, not what one step is worth."
    )
    return "\n\n".join([text, grid(names, rows)])


def claims(data: Data) -> list[Claim]:
    methods = grouped(data["rows"], "algorithm")
    (lora, deviation), found = spread(methods["lora-ppo"], "gold_after"), []
    for name in ("hydra-ppo", "j-hydra-ppo"):
        mean, _ = spread(methods[name], "gold_after")
        ours = f"{told(methods[name], 'gold_after')} against {told(methods['lora-ppo'], 'gold_after')}"
        met = mean >= lora - deviation
        found.append(Claim(f"{name} keeps LoRA-PPO's quality, held-out gold", "as good within the spread", ours, met))
    return found


def draw(data: Data, path: Path) -> None:
    """A point a seed and the mean of each method."""
    from benchmarks.claims_plots import points

    methods = grouped(data["rows"], "algorithm")
    before = [row["gold_before"] for row in methods[next(iter(methods))]]
    columns = {"before\n(Hydra-SFT)": before} | {n: [row["gold_after"] for row in r] for n, r in methods.items()}
    points(columns, "held-out gold, points", path)


PART = Part("quality", measure, markdown, claims, {"claims_quality.png": draw})
