"""Seconds a sample of LoRA-PPO, J-Hydra-PPO and Hydra-PPO: each at its largest batch under one cap, and at equal batch.

The cap gives every parameter as many bytes as 80 GB give those of Llama-7B: the paper's GPU for its model.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.claims_record import Claim, Data, Part, megabytes, percent
from benchmarks.claims_scale import WITH_ADAPTERS, Crew, Scale, Workshop, largest_batch
from benchmarks.claims_trainee import Trainee
from benchmarks.tables import grid

DTYPE = "bfloat16"
PAPER = {"lora-ppo": (68.0, 18.75), "j-hydra-ppo": (67.9, 5.01), "hydra-ppo": (71.1, 6.47)}  # GB, s a sample


def measure(scale: Scale, workshop: Workshop) -> Data:
    parameters = scale.parameters(scale.adapted)
    cap = round(scale.cap_bytes_a_parameter * parameters)
    jobs = {name: workshop.job(name, scale.adapted, DTYPE) for name in WITH_ADAPTERS}
    rows: dict[str, Data] = {}
    for name, job in jobs.items():
        with Trainee(job, exact=True) as trainee:
            batch, peaks = largest_batch(trainee, cap, scale.most)
        rows[name] = {"method": name, "batch": batch, "peak_bytes": peaks.get(batch), "peaks": peaks}
    sizes = sorted({row["batch"] for row in rows.values() if row["batch"]})
    equal = {sizes[0], sizes[-1]} if sizes else set()
    batches = {job: equal | ({rows[name]["batch"]} - {0}) for name, job in jobs.items()}
    taken = Crew(list(jobs.values()), scale.together).seconds(batches, scale.rounds) if sizes else {}
    for name, job in jobs.items():
        rows[name]["seconds"] = {str(batch): taken[job, batch] for batch in sorted(batches[job])}
    shape = asdict(scale.adapted)
    return {"rows": list(rows.values()), "cap": cap, "parameters": parameters, "equal": sorted(equal), "shape": shape}


def seconds(row: Data, batch: int, phase: str = "total") -> float | None:
    """The median over the rounds, a sample."""
    rounds = row["seconds"].get(str(batch))
    return median(r[phase] for r in rounds) if rounds else None


def _spread(row: Data, batch: int) -> str:
    values = [r["total"] for r in row["seconds"].get(str(batch), [])]
    return f"{1e3 * min(values):.0f} to {1e3 * max(values):.0f}" if values else ""


def markdown(data: Data) -> str:
    shape = data["shape"]
    text = (
        f"A Llama of {data['parameters'] / 1e6:,.1f}M parameters, {DTYPE}, rank {shape['rank']}, {shape['prompt']} + "
        f"{shape['response']} tokens, one epoch. The cap is {megabytes(data['cap'])} MB. PPO and SFT do not fit "
        f"under it: their static bytes alone are above."
    )
    base = {row["method"]: row for row in data["rows"]}["lora-ppo"]
    names = (
        "", "largest batch", "peak MB", "ms a sample", "least to most", "of it generate", "score", "update",
        "of LoRA-PPO's", "paper: s a sample", "of LoRA-PPO's",
    )  # fmt: skip
    rows = []
    for row in data["rows"]:
        cells = [row["method"], str(row["batch"])]
        if row["batch"]:
            cells += [megabytes(row["peak_bytes"]), f"{1e3 * (seconds(row, row['batch']) or 0):.0f}"]
            cells += [_spread(row, row["batch"])]
            cells += [f"{1e3 * (seconds(row, row['batch'], p) or 0):.0f}" for p in ("generate", "score", "update")]
            cells += [_ratio(seconds(row, row["batch"]), seconds(base, base["batch"]))]
        else:
            cells += [""] * 7
        cells += [f"{PAPER[row['method']][1]}", _ratio(PAPER[row["method"]][1], PAPER["lora-ppo"][1])]
        rows.append(cells)
    parts = [text, "**Each at its largest batch**", grid(names, rows), "**At equal batch: the control**"]
    control = []
    for row in data["rows"]:
        cells = [row["method"]]
        for batch in data["equal"]:
            value = seconds(row, batch)
            cells += ["" if value is None else f"{1e3 * value:.0f}", _ratio(value, seconds(base, batch))]
        control.append(cells)
    if not data["equal"]:
        return "\n\n".join(parts[:-1])
    heads = [cell for batch in data["equal"] for cell in (f"batch {batch}: ms a sample", "of LoRA-PPO's")]
    return "\n\n".join([*parts, grid(("", *heads), control)])


def _ratio(value: float | None, of: float | None) -> str:
    return f"{value / of:.3f}" if value and of else ""


def claims(data: Data) -> list[Claim]:
    rows = {row["method"]: row for row in data["rows"]}
    base, found = rows["lora-ppo"], []
    for name in ("hydra-ppo", "j-hydra-ppo"):
        row = rows[name]
        paper = PAPER[name][1] / PAPER["lora-ppo"][1]
        if not (row["batch"] and base["batch"]):
            found.append(Claim(f"{name}, s a sample at its largest batch", percent(paper), "does not fit", None))
            continue
        ratio = (seconds(row, row["batch"]) or 0) / (seconds(base, base["batch"]) or 1)
        ours = f"{percent(ratio)} (batch {row['batch']} against {base['batch']})"
        found.append(
            Claim(f"{name} over LoRA-PPO, s a sample, each at its largest batch", percent(paper), ours, ratio <= paper)
        )
        equal = [(b, (seconds(row, b) or 0) / (seconds(base, b) or 1)) for b in data["equal"]]
        ours = ", ".join(f"{percent(value)} at {batch}" for batch, value in equal)
        found.append(Claim(f"{name} over LoRA-PPO, the control at equal batch", "not in the paper", ours, None))
    return found


def draw(data: Data, path: Path) -> None:
    """Seconds a sample, by phase, at the largest batch."""
    from benchmarks.claims_plots import bars

    rows = [row for row in data["rows"] if row["batch"]]
    names = [f"{row['method']}\nbatch {row['batch']}" for row in rows]
    parts = {p: [1e3 * (seconds(r, r["batch"], p) or 0) for r in rows] for p in ("generate", "score", "update")}
    panels = [("each at its largest batch", names, parts)]
    for batch in data["equal"][-1:]:
        same = {p: [1e3 * (seconds(r, batch, p) or 0) for r in rows] for p in ("generate", "score", "update")}
        panels.append((f"all at batch {batch}", [row["method"] for row in rows], same))
    bars(panels, "ms a sample", path)


PART = Part("latency", measure, markdown, claims, {"claims_latency.png": draw})
