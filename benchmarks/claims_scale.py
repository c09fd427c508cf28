"""How large the claims are measured: on a CPU by default, on one H200 with 1B and 7B models, or in seconds."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.claims_model import Shape
from benchmarks.claims_trainee import Job, Trainee

FEW = 6  # batches tried along the line
WITH_ADAPTERS = ("lora-ppo", "j-hydra-ppo", "hydra-ppo")
# What 80 GB are for each of Llama-7B's 6,738,415,616 parameters: the memory of the paper's GPU, for its model.
A100_BYTES_A_PARAMETER = 80e9 / 6_738_415_616

TINY = Shape(layers=2, width=32, inner=48, heads=2, kv_heads=2, vocabulary=64, rank=4, prompt=8, response=8)


@dataclass(frozen=True)
class Demo:
    """The runs on the demo task: seeds, and fewer steps than the demo's own where they are given."""

    seeds: tuple[int, ...] = (0, 1, 2)
    sft_steps: int | None = None
    steps: int | None = None
    processes: int = 2


@dataclass(frozen=True)
class Scale:
    """`whole`: the model where whole models train; `adapted`: where only adapters do. `together`: all processes fit.

    `batch`: sequences where bytes are compared; `updates`: before exactness is looked at again; `rounds`: of timings;
    `most`: the largest batch that is tried.
    """

    name: str
    whole: Shape
    adapted: Shape
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch: int = 4
    whole_batch: int = 4
    rounds: int = 5
    most: int = 64
    cap_bytes_a_parameter: float = A100_BYTES_A_PARAMETER
    updates: int = 50
    together: bool = True
    demo: Demo = Demo()

    def tiny(self) -> "Scale":
        """The same measurements on the CPU in seconds."""
        demo = Demo(seeds=(0, 1), sft_steps=2, steps=2, processes=2)
        return replace(
            self, name="tiny", whole=TINY, adapted=TINY, device="cpu", batch=2, whole_batch=2, rounds=1, most=4,
            cap_bytes_a_parameter=5e3,
            updates=4, together=True, demo=demo,
        )  # fmt: skip

    def parameters(self, shape: Shape) -> int:
        """Of one copy of the model."""
        attention = shape.width**2 * (2 + 2 * shape.kv_heads / shape.heads)
        layer = attention + 3 * shape.width * shape.inner + 2 * shape.width
        return round(shape.layers * layer + (2 * shape.vocabulary + 1) * shape.width)


_SMALL = Shape(layers=8, width=512, inner=1376, heads=8, kv_heads=8, vocabulary=1024, rank=16, prompt=48, response=48)
_CPU = Scale("cpu", _SMALL, _SMALL)
SCALES = {
    "cpu": _CPU,
    "h200": Scale(
        "h200",
        Shape(16, 2048, 8192, 32, 8, 32000, 64, 256, 256),  # 1B: PPO's 36 to 40 bytes a parameter leave room
        Shape(32, 4096, 11008, 32, 32, 32000, 128, 400, 400),  # Llama-7B at the paper's lengths and rank
        device="cuda", together=False, most=256,
    ),
    "tiny": _CPU.tiny(),
}  # fmt: skip


class Workshop:
    """The files of a scale's models, jobs for processes that train them, and runs on the demo task."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        from benchmarks.claims_demo import Runs

        self.scale, self.folder = scale, folder
        self.runs = Runs(scale.demo, folder / "demo-runs")

    def job(self, algorithm: str, shape: Shape, dtype: str, reward_model: bool = False) -> Job:
        """A job on the scale's device; the model is written on first use."""
        stored = torch.bfloat16 if self.scale.device == "cuda" else torch.float32
        sizes = f"{shape.layers}x{shape.width}x{shape.prompt}"
        return Job(
            algorithm, shape, str(shape.write(self.folder / f"model-{sizes}", stored)),
            TINY, str(TINY.write(self.folder / "warm-up")), dtype, self.scale.device,
            reward_model=reward_model, adapters=algorithm in WITH_ADAPTERS,
        )  # fmt: skip


class Crew:
    """Processes that time their steps in turns: all alive at once, or, where they do not fit, one after the other."""

    def __init__(self, jobs: list[Job], together: bool) -> None:
        self.jobs, self.together = jobs, together

    def seconds(self, batches: dict[Job, set[int]], rounds: int) -> dict[tuple[Job, int], list[dict[str, float]]]:
        """(job, batch) -> a dict a round: `total` and each phase, seconds a sample."""
        found: dict[tuple[Job, int], list[dict[str, float]]] = {}
        groups = [self.jobs] if self.together else [[job] for job in self.jobs]
        samples = max(max(sizes) for sizes in batches.values())  # of each in a round, at least
        for group in groups:
            with ExitStack() as stack:
                crew = {job: stack.enter_context(Trainee(job)) for job in group}
                for number in range(rounds + 1):
                    for job, trainee in crew.items():
                        for batch in sorted(batches[job]):
                            steps = 1 if number == 0 else -(-samples // batch)
                            done = trainee.steps(batch, steps)
                            if number:  # the first round warms up
                                found.setdefault((job, batch), []).append(_a_sample(done.seconds, done.phases, batch))
        return found


def _a_sample(seconds: list[float], phases: list[dict[str, float]], batch: int) -> dict[str, float]:
    count = len(seconds) * batch
    return {"total": sum(seconds) / count} | {name: sum(p[name] for p in phases) / count for name in phases[0]}


def largest_batch(trainee: Trainee, cap: int, most: int) -> tuple[int, dict[int, int]]:
    """The largest batch, up to `most`, whose measured peak is within `cap` bytes (0: none), and all peaks measured.

    Peaks grow almost linearly, so the next batch tried is where the line through the last two would meet the cap; after
    a few, and where there was no room at all, the middle.
    """
    from benchmarks.claims_trainee import OutOfMemory

    peaks: dict[int, int] = {}
    low, high, batch = 0, most + 1, 1
    while high - low > 1:
        try:
            peaks[batch] = trainee.steps(batch).peak_bytes
        except OutOfMemory:
            high = batch
        else:
            low, high = (batch, high) if peaks[batch] <= cap else (low, batch)
        lined = len(peaks) < FEW and (high in peaks or high > most)
        wanted = _meeting(peaks, cap) if lined else (low + high) // 2
        batch = min(max(wanted, low + 1), high - 1, 4 * max(low, 1))
    return low, peaks


def _meeting(peaks: dict[int, int], cap: int) -> int:
    """Where the line through the two largest batches measured meets the cap; twice the last where there is no line."""
    last = max(peaks)
    if len(peaks) < 2:
        return 2 * last
    (low, below), (high, above) = sorted(peaks.items())[-2:]
    each = (above - below) / (high - low)
    return int(low + (cap - below) / each) if each > 0 else 2 * last
