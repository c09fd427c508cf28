"""Copies and bytes: base copies and adapter sets counted in live tensors, static bytes, and the peak of whole steps."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.claims_record import Claim, Data, Part, megabytes
from benchmarks.claims_scale import Scale, Workshop
from benchmarks.claims_trainee import Job, OutOfMemory, Trainee
from benchmarks.tables import grid

REMAX_OWN = "remax with its own reward model"
# (algorithm, a reward model apart), from one whole model to four
METHODS = (
    ("sft", False), ("ppo", False), ("remax", True), ("remax", False),
    ("lora-ppo", False), ("j-hydra-ppo", False), ("hydra-ppo", False),
)  # fmt: skip
PAPER_COPIES = {"ppo": (4, 0), "lora-ppo": (4, 2), "j-hydra-ppo": (1, 1), "hydra-ppo": (1, 2)}
STEPS = 3  # the first makes the optimiser's state
PROCESSES = {"cpu": 2, "cuda": 1}
SHORT = {"float32": "fp32", "bfloat16": "bf16 with fp32 master"}


def measure(scale: Scale, workshop: Workshop) -> Data:
    jobs = [workshop.job(a, scale.whole, dtype, own) for dtype in scale.dtypes for a, own in METHODS]

    def run(job: Job) -> Data:
        row: Data = {"method": job.name, "dtype": job.dtype}
        try:
            with Trainee(job, exact=True) as trainee:
                found = [trainee.steps(scale.batch) for _ in range(STEPS)]
        except OutOfMemory as error:
            return row | {"unavailable": str(error)}
        return row | asdict(found[-1]) | {"peak_bytes": max(f.peak_bytes for f in found)}

    with ThreadPoolExecutor(PROCESSES[scale.device]) as pool:
        rows = list(pool.map(run, jobs))
    parameters = scale.parameters(scale.whole)
    return {"rows": rows, "parameters": parameters, "batch": scale.batch, "shape": asdict(scale.whole)}


def by_method(data: Data, dtype: str) -> dict[str, Data]:
    return {r["method"]: r for r in data["rows"] if r["dtype"] == dtype and "unavailable" not in r}


def dtypes(data: Data) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in data["rows"]))


def markdown(data: Data) -> str:
    shape, n = data["shape"], data["parameters"]
    parts = [
        f"A Llama of {n / 1e6:,.1f}M parameters ({shape['layers']} layers of {shape['width']}), rank {shape['rank']} "
        f"on every linear layer, {data['batch']} sequences of {shape['prompt']} + {shape['response']} tokens in one "
        f"micro-batch. MB are 10^6 bytes."
    ]
    for dtype in dtypes(data):
        found = by_method(data, dtype)
        sft = found.get("sft")
        rows = []
        for row in (r for r in data["rows"] if r["dtype"] == dtype):
            if "unavailable" in row:
                rows.append([row["method"], row["unavailable"], *[""] * 7])
                continue
            static, peak = row["static_bytes"], row["peak_bytes"]
            cells = [row["method"], f"{row['bases']} x {row['adapters']}", megabytes(static), f"{static / n:.2f}"]
            cells += [f"{static / sft['static_bytes']:.2f}x" if sft else ""]
            cells += [megabytes(row["passes_bytes"]), megabytes(row["update_bytes"]), megabytes(peak)]
            rows.append([*cells, f"{peak / sft['peak_bytes']:.2f}x" if sft else ""])
        names = (
            "", "bases x adapters", "static MB", "bytes a parameter", "of SFT's", "passes MB", "optimiser's step MB",
            "peak MB", "of SFT's",
        )  # fmt: skip
        parts += [f"**{SHORT[dtype]}**", grid(names, rows)]
    return "\n\n".join(parts)


def claims(data: Data) -> list[Claim]:
    found = [_copies(data, method, copies) for method, copies in PAPER_COPIES.items()]
    for dtype in dtypes(data):
        rows = by_method(data, dtype)
        if "sft" in rows and "ppo" in rows:
            found += _against_sft(rows, SHORT[dtype], "ppo", "more than 3x", lambda ratio: ratio > 3)
        if "sft" in rows and "lora-ppo" in rows:
            found += _against_sft(rows, SHORT[dtype], "lora-ppo", "less", lambda ratio: ratio < 1)
        if "ppo" in rows and REMAX_OWN in rows:
            found += _remax(rows, dtype)
    return found


def _copies(data: Data, method: str, copies: tuple[int, int]) -> Claim:
    counted = {(r["bases"], r["adapters"]) for r in data["rows"] if r["method"] == method and "unavailable" not in r}
    ours = ", ".join(f"{b} x {a}" for b, a in sorted(counted)) or "not measured"
    met = counted == {copies} if counted else None
    return Claim(f"{method}: base copies x adapter sets", f"{copies[0]} x {copies[1]}", ours, met)


def _against_sft(rows: dict[str, Data], dtype: str, method: str, paper: str, good) -> list[Claim]:
    keys = ("static_bytes", "passes_bytes", "peak_bytes")
    static, passes, peak = (rows[method][key] / max(rows["sft"][key], 1) for key in keys)
    ours = f"{peak:.2f}x at the peak; {static:.2f}x static, {passes:.2f}x the passes"
    return [Claim(f"{method} against SFT, memory, {dtype}", paper, ours, good(peak))]


def _remax(rows: dict[str, Data], dtype: str) -> list[Claim]:
    expected = {"bfloat16": 20 / 36, "float32": 24 / 40}[dtype]
    ppo, own = rows["ppo"], rows[REMAX_OWN]
    static, peak = (own[key] / ppo[key] for key in ("static_bytes", "peak_bytes"))
    found = [
        Claim(
            f"ReMax over PPO, static, {SHORT[dtype]}", f"{expected:.3f} by counting", f"{static:.3f}",
            abs(static / expected - 1) < 0.02,
        ),
        Claim(f"ReMax over PPO, peak, {SHORT[dtype]}", "-44 to -50 %", f"{100 * (peak - 1):+.0f} %", peak <= 0.56),
    ]  # fmt: skip
    if "remax" in rows:
        shared = [rows["remax"][key] / ppo[key] for key in ("static_bytes", "peak_bytes")]
        ours = f"static {shared[0]:.3f}, peak {100 * (shared[1] - 1):+.0f} %"
        what = f"ReMax over PPO, {SHORT[dtype]}, reference and reward on one frozen copy"
        found.append(Claim(what, "not in the paper", ours, None))
    return found


def draw(data: Data, path: Path) -> None:
    """Static bytes and what the peak adds, a bar a method, a panel a dtype."""
    from benchmarks.claims_plots import bars

    panels = []
    for dtype in dtypes(data):
        rows = by_method(data, dtype)
        names = [name.replace(" with its own reward model", "\n+ reward model") for name in rows]
        static = [row["static_bytes"] / 1e6 for row in rows.values()]
        rest = [max(row["peak_bytes"] - row["static_bytes"], 0) / 1e6 for row in rows.values()]
        panels.append((SHORT[dtype], names, {"weights, gradients, optimiser": static, "what the peak adds": rest}))
    bars(panels, "MB", path)


PART = Part("memory", measure, markdown, claims, {"claims_memory.png": draw})
