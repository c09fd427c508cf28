"""Runs on the demo task, several at a time in processes of their own: what quality and the regularisers are told from.

    python -m benchmarks.claims_demo JSON     a folder, a seed, and the runs to make from its Hydra-SFT model

A seed covers the whole pipeline: its Hydra-SFT model, the rollouts, the updates. Held-out gold, the controls against
tricks and the settings are the demo's own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

from benchmarks.claims_record import Data
from benchmarks.claims_scale import Demo
from benchmarks.machine import ROOT

CHUNKS = 2  # processes a seed: libraries take some seconds to load, and the last to end should not be alone for long


@dataclass(frozen=True)
class Run:
    """One training run. `estimator`: of the penalty; all else is as the demo has it."""

    algorithm: str
    estimator: str
    seed: int


class Runs:
    """Finished runs by what they were; asks for none twice."""

    def __init__(self, demo: Demo, folder: Path) -> None:
        self.demo, self.folder = demo, folder
        self.found: dict[Run, Data] = {}

    def get(self, wanted: Iterable[tuple[str, str]]) -> list[Data]:
        """Every (algorithm, estimator) wanted, at every seed."""
        runs = [Run(*pair, seed) for pair in wanted for seed in self.demo.seeds]
        missing = [run for run in runs if run not in self.found]
        todo = [m for m in self.demo.seeds if any(r.seed == m for r in missing) and not self._base(m).is_dir()]
        with ThreadPoolExecutor(self.demo.processes) as pool:
            list(pool.map(lambda seed: self._process(seed, []), todo))
            chunks = [
                chunk for first in range(CHUNKS) for seed in self.demo.seeds
                if (chunk := [run for run in missing if run.seed == seed][first::CHUNKS])
            ]  # fmt: skip
            for made in pool.map(lambda chunk: self._process(chunk[0].seed, chunk), chunks):
                self.found |= {Run(row["algorithm"], row["estimator"], row["seed"]): row for row in made}
        return [self.found[run] for run in runs]

    def _base(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / "hydra-sft"

    def _process(self, seed: int, runs: list[Run]) -> list[Data]:
        """Makes the seed's Hydra-SFT model where there are no runs, else the runs from it."""
        pairs = [(run.algorithm, run.estimator) for run in runs]
        job = {"base": str(self._base(seed)), "seed": seed, "runs": pairs}
        job |= {"sft_steps": self.demo.sft_steps, "steps": self.demo.steps}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.claims_demo", json.dumps(job)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the demo's runs {pairs} of seed {seed} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


# ---- in the process ----------------------------------------------------------------------------------------------


def trained(base: Path, seed: int, algorithm: str, estimator: str, steps: int | None) -> Data:
    """One run and what came of it on the held-out prompts."""
    from rlhf_trainer.demo.run import train_policy
    from rlhf_trainer.demo.settings import least_rise

    started, output = time.process_time(), base.parent / f"{algorithm}-{estimator}"
    before, after, result = train_policy(
        algorithm, base, output, seed, steps, report=False, kl_estimator=estimator, num_sample_completions=0
    )
    pairs = list(zip(before.gold, after.gold))
    wins = fmean((b < a) + (b == a) / 2 for b, a in pairs)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    history = [line for line in lines if "objective/kl" in line]
    return {
        "algorithm": algorithm, "estimator": estimator, "seed": seed, **result.as_dict(),
        "passed": result.passed(least_rise(algorithm)),
        "win_rate": wins, "kl": lines[-1]["eval/kl"], "seconds": time.process_time() - started,
        "curve": [(line["objective/kl"], line["reward"]) for line in history],
    }  # fmt: skip


def main() -> None:
    import contextlib

    from rlhf_trainer.demo.run import quiet, train_base

    job = json.loads(sys.argv[1])
    base = Path(job["base"])
    quiet()
    with contextlib.redirect_stdout(sys.stderr):
        if not job["runs"]:
            train_base(base, job["seed"], job["sft_steps"])
        rows = [trained(base, job["seed"], algorithm, name, job["steps"]) for algorithm, name in job["runs"]]
    print(json.dumps(rows))


def spread(rows: list[Data], key: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = [row[key] for row in rows]
    return fmean(values), pstdev(values)


def told(rows: list[Data], key: str, digits: int = 1, factor: float = 1) -> str:
    """ "29.1 +- 0.4" """
    mean, deviation = spread(rows, key)
    return f"{factor * mean:.{digits}f} ± {factor * deviation:.{digits}f}"


def grouped(rows: list[Data], key: str) -> dict[str, list[Data]]:
    return {name: [row for row in rows if row[key] == name] for name in dict.fromkeys(row[key] for row in rows)}


if __name__ == "__main__":
    main()
