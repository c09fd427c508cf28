"""ReMax against our own full-parameter PPO: largest batch under one cap, and time split into G, F and U.

G generates, F scores and U updates one model. Counted: PPO = G + F + 2U and ReMax = 2G + F' + U. With a reward model
apart both score four passes a prompt, so F' = F; where reference and reward model share one copy, F' = 3/4 F.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.claims_memory import REMAX_OWN
from benchmarks.claims_record import Claim, Data, Part, megabytes
from benchmarks.claims_scale import Crew, Scale, Workshop, largest_batch
from benchmarks.claims_trainee import PHASES, Trainee
from benchmarks.tables import grid

DTYPE = "bfloat16"
ROUNDS = 3  # at most: a round of whole models is long
PASSES = {REMAX_OWN: 1.0, "remax": 0.75}  # scoring passes over PPO's four
METHODS = (("ppo", False), ("remax", True), ("remax", False))


def measure(scale: Scale, workshop: Workshop) -> Data:
    """The cap is what PPO takes with `scale.whole_batch` sequences."""
    jobs = [workshop.job(a, scale.whole, DTYPE, own) for a, own in METHODS]
    rows: dict[str, Data] = {}
    cap, sizes = 0, (1, scale.whole_batch)
    for job in jobs:
        with Trainee(job, exact=True) as trainee:
            trainee.steps(1)  # makes the optimiser's state
            if job.algorithm == "ppo":
                batch, peaks = scale.whole_batch, {size: trainee.steps(size).peak_bytes for size in sizes}
                cap = peaks[batch]
            else:
                batch, peaks = largest_batch(trainee, cap, scale.most)
        rows[job.name] = {"method": job.name, "batch": batch, "peaks": peaks}
    batches = {job: {scale.whole_batch, rows[job.name]["batch"]} - {0} for job in jobs}
    taken = Crew(jobs, scale.together).seconds(batches, min(ROUNDS, scale.rounds))
    for job in jobs:
        rows[job.name]["seconds"] = {str(batch): taken[job, batch] for batch in sorted(batches[job])}
    return {
        "rows": list(rows.values()), "cap": cap, "equal": scale.whole_batch, "shape": asdict(scale.whole),
        "parameters": scale.parameters(scale.whole), "most": scale.most,
    }  # fmt: skip


def phases(row: Data, batch: int) -> dict[str, float]:
    """Medians over the rounds: each phase and the total, seconds a sample."""
    rounds = row["seconds"][str(batch)]
    return {name: median(r[name] for r in rounds) for name in ("total", *PHASES)}


def predicted(ppo: dict[str, float], passes: float) -> dict[str, float]:
    """ReMax by the time model from PPO's G, F and 2U."""
    parts = {"generate": 2 * ppo["generate"], "score": passes * ppo["score"], "update": ppo["update"] / 2}
    return parts | {"total": sum(parts.values())}


def growth(row: Data) -> float | None:
    """Bytes that one more sequence adds to the peak, between the smallest and the largest batch measured."""
    peaks = {int(batch): count for batch, count in row["peaks"].items()}
    low, high = min(peaks), max(peaks)
    return (peaks[high] - peaks[low]) / (high - low) if high > low else None


def markdown(data: Data) -> str:
    rows = {row["method"]: row for row in data["rows"]}
    equal, shape = data["equal"], data["shape"]
    ppo = phases(rows["ppo"], equal)
    text = (
        f"A Llama of {data['parameters'] / 1e6:,.1f}M parameters, every one trained with AdamW, {DTYPE} with fp32 "
        f"master, {shape['prompt']} + {shape['response']} tokens, one epoch, one optimiser step a rollout."
    )
    table = []
    for name, row in rows.items():
        mine = phases(row, equal)
        table.append(
            [name, *(f"{1e3 * mine[p]:.1f}" for p in (*PHASES, "total")), f"{ppo['total'] / mine['total']:.2f}x"]
        )
        if name != "ppo":
            model = predicted(ppo, PASSES[name])
            cells = [f"{1e3 * model[p]:.1f}" for p in (*PHASES, "total")]
            passes = "F" if PASSES[name] == 1 else f"{PASSES[name]:g} F"
            table.append([f"predicted: 2G + {passes} + U", *cells, f"{ppo['total'] / model['total']:.2f}x"])
    names = ("", "generate (G)", "score (F)", "update (U; PPO 2U)", "ms a sample", "faster than PPO")
    capped = []
    for name, row in rows.items():
        more, batch = growth(row), row["batch"]
        at_most = "at least " if batch == data["most"] else ""
        total = phases(row, batch)["total"] if batch else None
        faster = phases(rows["ppo"], rows["ppo"]["batch"])["total"] / total if total else 0
        capped.append([
            name, at_most + str(batch), f"{batch / rows['ppo']['batch']:.2f}x", megabytes(more) if more else "",
            f"{1e3 * total:.1f}" if total else "", f"{faster:.2f}x",
        ])  # fmt: skip
    heads = ("", "largest batch", "of PPO's", "MB a sequence", "ms a sample", "faster than PPO")
    cap = f"**Each at its largest batch under {megabytes(data['cap'])} MB**, what PPO takes with {equal} sequences"
    return "\n\n".join([text, f"**At {equal} sequences**", grid(names, table), cap, grid(heads, capped)])


def claims(data: Data) -> list[Claim]:
    rows = {row["method"]: row for row in data["rows"]}
    ppo, row, equal = rows["ppo"], rows[REMAX_OWN], data["equal"]
    theirs, mine = phases(ppo, equal), phases(row, equal)
    model = theirs["total"] / predicted(theirs, PASSES[REMAX_OWN])["total"]
    speed = theirs["total"] / mine["total"]
    batch = row["batch"] / ppo["batch"]
    found = [
        Claim("PPO over ReMax, time, equal batch", ">= 1.6x", f"{speed:.2f}x (model: {model:.2f}x)", speed >= 1.6),
        Claim("ReMax over PPO, largest batch under one cap", ">= 1.3x", f"{batch:.2f}x", batch >= 1.3),
    ]
    if row["batch"]:
        at = phases(ppo, ppo["batch"])["total"] / phases(row, row["batch"])["total"]
        found.append(Claim("PPO over ReMax, time, each at its largest batch", ">= 1.6x", f"{at:.2f}x", at >= 1.6))
    ours = f"{mine['generate'] / theirs['generate']:.2f} G"
    found.append(
        Claim("sampled and greedy completions in one rollout", "2 G", ours, mine["generate"] < 2 * theirs["generate"])
    )
    return found


def draw(data: Data, path: Path) -> None:
    """Seconds a sample by phase at equal batch, predicted beside measured."""
    from benchmarks.claims_plots import bars

    rows = {row["method"]: row for row in data["rows"]}
    ppo = phases(rows["ppo"], data["equal"])
    columns = {"PPO": ppo}
    for name, title in ((REMAX_OWN, "ReMax"), ("remax", "ReMax, one frozen copy")):
        columns[f"{title}, predicted"] = predicted(ppo, PASSES[name])
        columns[title] = phases(rows[name], data["equal"])
    parts = {p: [1e3 * column[p] for column in columns.values()] for p in PHASES}
    bars([(f"{data['equal']} sequences", list(columns), parts)], "ms a sample", path)


PART = Part("remax", measure, markdown, claims, {"claims_remax.png": draw})
