"""The regularisers as per-token penalties of Hydra-PPO on the demo task: reward against the KL it costs, over seeds."""

from pathlib import Path
from statistics import fmean

from benchmarks.claims_demo import grouped, spread, told
from benchmarks.claims_record import Claim, Data, Part
from benchmarks.claims_scale import Scale, Workshop
from benchmarks.tables import grid

METHOD = "hydra-ppo"
ESTIMATORS = (
    "none", "kl", "clamped_kl", "squared_error", "bregman", "jensen_shannon", "full_kl", "full_js",
)  # fmt: skip


def measure(scale: Scale, workshop: Workshop) -> Data:
    from rlhf_trainer.demo.settings import COMMON, TUNED

    settings = COMMON | TUNED[METHOD]
    return {"rows": workshop.runs.get([(METHOD, name) for name in ESTIMATORS]), "kl_coef": settings["kl_coef"]}


def markdown(data: Data) -> str:
    rows = []
    for name, mine in grouped(data["rows"], "estimator").items():
        cells = [f"`{name}`", told(mine, "kl", 2), told(mine, "reward_after", 2), told(mine, "gold_after")]
        cells += [told(mine, "win_rate", 1, 100), told(mine, "distinct_ratio", 2), told(mine, "nll_rise", 2)]
        rows.append([*cells, f"{sum(row['passed'] for row in mine)} of {len(mine)}"])
    names = (
        "", "KL (nats)", "reward model", "gold, held out", "win % over SFT", "distinct pairs", "nats a token under SFT",
        "controls passed",
    )  # fmt: skip
    text = (
        f"{METHOD} with the demo's settings and one weight for all, {data['kl_coef']:g}, on the held-out prompts: "
        f"mean and standard deviation over the seeds. One weight does not mean one strength: near the reference the "
        f"second-order penalties are far weaker than `kl`, and the two Jensen-Shannon ones are bounded by ln 2. So "
        f"compare the curves of the plot at equal KL."
    )
    return "\n\n".join([text, grid(names, rows)])


def claims(data: Data) -> list[Claim]:
    found = grouped(data["rows"], "estimator")
    mean, deviation = spread(found["kl"], "win_rate")
    none, other = spread(found["none"], "win_rate")
    js, _ = spread(found["jensen_shannon"], "win_rate")
    gold = f"gold {told(found['none'], 'gold_after')} against {told(found['kl'], 'gold_after')}"
    return [
        Claim(
            "no penalty against `kl`, win rate over SFT", "no worse",
            f"{100 * (none - mean):+.1f} points; {gold}", none >= mean - max(deviation, other),
        ),
        Claim(
            "`jensen_shannon` against `kl`, win rate over SFT", "+1 to +3 points",
            f"{100 * (js - mean):+.1f} points", js - mean >= 0.01,
        ),
    ]  # fmt: skip


def draw(data: Data, path: Path) -> None:
    """Reward against KL: the seeds' mean at every step of the training, and where the held-out prompts end up."""
    from benchmarks.claims_plots import curves

    lines, ends = {}, {}
    for name, rows in grouped(data["rows"], "estimator").items():
        steps = zip(*(row["curve"] for row in rows))
        lines[name] = [(fmean(kl for kl, _ in step), fmean(reward for _, reward in step)) for step in steps]
        ends[name] = [(row["kl"], row["gold_after"]) for row in rows]
    curves(lines, ends, path)


PART = Part("regularisers", measure, markdown, claims, {"claims_regularisers.png": draw})
