"""The memory plan beside what the trainer takes: every algorithm at three sizes, each in a fresh process.

Static bytes are those of live tensors at an optimiser step. Peaks are exact too: `live_bytes.c` stands before malloc
in the process and counts what is live, so that neither the allocator's habits nor a file that is mapped blur them; what
was live before any model was made is taken off.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, commit, describe, versions
from benchmarks.memory_plan_run import Work, planned
from benchmarks.tables import grid

BOUND = 0.10  # of the measured peak
CHECKPOINTED = ("sft", "dpo", "ppo", "hydra-ppo", "remax", "superhf")
RESULT = Path("benchmarks/results/cpu/memory.json")
MIB = 2**20


def works() -> Iterator[Work]:
    """Every run, the small ones first."""
    from rlhf_trainer.algorithms import TABLE

    for size, response in (("1M", 64), ("10M", 64), ("60M", 32)):
        for dtype in ("float32", "bfloat16"):
            for name in TABLE:
                yield Work(name, size, dtype, prompt=response, response=response)
                if size == "10M" and name in CHECKPOINTED:
                    yield Work(name, size, dtype, True, prompt=response, response=response)


def measure(chosen: Iterable[Work], known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A record a run; those in `known` (by their work, as JSON) are taken as they are."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "live_bytes.so"
        source = Path(__file__).with_name("live_bytes.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        with _runner(library) as runner:
            assert runner.stdin is not None
            assert runner.stdout is not None
            for work in chosen:
                key = json.dumps(asdict(work))
                record = known.get(key)
                if record is None:
                    runner.stdin.write(key + "\n")
                    runner.stdin.flush()
                    answer = runner.stdout.readline()
                    record = {"work": asdict(work), "date": today(), "commit": commit()}
                    record |= json.loads(answer) if answer else {"error": "no answer"}
                with tempfile.TemporaryDirectory() as place:  # planned anew: what was measured stays true
                    yield record | ({} if "error" in record else {"planned": planned(work, Path(place))})


def _runner(library: Path) -> "subprocess.Popen[str]":
    """The process that forks one for every run."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",  # a pool of threads does not outlive a fork
    }
    command = [sys.executable, "-m", "benchmarks.memory_plan_run"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run(only: str | None, file: Path | None, again: bool) -> dict[str, Any]:
    """Measures (what `file` holds already is not measured again unless `again`), writing after every run."""
    known = {}
    if file is not None and file.is_file():
        known = {json.dumps(r["work"]): r for r in json.loads(file.read_text())["runs"] if "error" not in r}
    chosen = [w for w in works() if only is None or only in f"{w.algorithm} {w.size} {w.dtype}"]
    result: dict[str, Any] = {
        "benchmark": "memory",
        "versions": versions(),
        "machine": describe("cpu"),
        "runs": [],
    }
    done = set()
    for record in measure(chosen, {} if again else known):
        done.add(json.dumps(record["work"]))
        result["runs"].append(record)
        print(line(record), file=sys.stderr, flush=True)
        if file is not None:
            rest = [r for key, r in known.items() if key not in done]
            file.write_text(json.dumps(result | {"runs": result["runs"] + rest}, indent=1) + "\n")
    return result


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def peaks(record: dict[str, Any]) -> tuple[int, int, str]:
    """The planned and the measured peak, and the phase it was measured in."""
    phase = max(record["peaks"], key=record["peaks"].get)
    return max(record["planned"]["peaks"].values()), record["peaks"][phase], phase


def line(record: dict[str, Any]) -> str:
    """A run in one line, for the terminal."""
    work = record["work"]
    name = f"{work['algorithm']} {work['size']} {work['dtype']}" + " checkpointing" * work["checkpointing"]
    if "error" in record:
        return f"{name}: {record['error']}"
    planned, measured, phase = peaks(record)
    static = record["planned"]["static"] - record["static"]
    return f"{name}: planned {planned / MIB:.1f}, measured {measured / MIB:.1f} MiB in the {phase}: " + (
        f"{planned / measured - 1:+.1%}; static off by {static} bytes"
    )


def markdown(result: dict[str, Any]) -> str:
    """A table a size: a line an algorithm, fp32 and bf16 side by side."""
    runs = [r for r in result["runs"] if "error" not in r]
    days, commits = (sorted({r[key] for r in runs}) for key in ("date", "commit"))
    made_with = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    errors = [abs(peaks(r)[0] / peaks(r)[1] - 1) for r in runs]
    within = sum(e <= BOUND for e in errors)
    parts = [
        f"### `memory`: planned beside measured on {result['machine']['cpu']}",
        f"Measured {' and '.join(days)} at commit {' and '.join(commits)} with {made_with}.",
        f"Peaks of {within} of {len(runs)} runs are within {BOUND:.0%} of the plan (the farthest {max(errors):.1%} off)"
        f"; static bytes are exact in {sum(r['static'] == r['planned']['static'] for r in runs)}. In MiB.",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in runs:
        work = record["work"]
        shape = f"{work['batch']} x ({work['prompt']} + {work['response']}) tokens a micro-batch"
        groups.setdefault(f"{work['size']} parameters, {work['dtype']}, {shape}", []).append(record)
    for title, records in groups.items():
        parts.append(f"**{title}**")
        header = ("", "static planned", "measured", "peak planned", "measured", "off by", "in the")
        parts.append(grid(header, [_cells(r) for r in records]))
    parts += [f"- {line(r)}" for r in result["runs"] if "error" in r]
    return "\n\n".join(parts)


def _cells(record: dict[str, Any]) -> list[str]:
    work = record["work"]
    planned, measured, phase = peaks(record)
    off = planned / measured - 1
    return [
        work["algorithm"] + (", checkpointing" if work["checkpointing"] else ""),
        f"{record['planned']['static'] / MIB:.2f}",
        f"{record['static'] / MIB:.2f}",
        f"{planned / MIB:.1f}",
        f"{measured / MIB:.1f}",
        f"{off:+.1%}" + ("" if abs(off) <= BOUND else " (missed)"),
        phase,
    ]
