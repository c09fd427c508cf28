"""One way of measuring for every benchmark: contestants interleaved in one process, memory in fresh processes.

Times are medians with minimum and maximum over the rounds. In a round every contestant runs once before any runs again,
so that what else the machine does falls on all alike. A slow contestant drops out once the budget of the case is gone;
a run shorter than `SHORT_S` is repeated in each round and its mean is taken. On a CUDA device times come from events
around the runs.
"""

import gc
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from subprocess import TimeoutExpired

import torch

from benchmarks import machine
from benchmarks.case import OURS, Case, Prepare, Run, Target, Unavailable
from benchmarks.memory import peak_in_fresh_process
from benchmarks.result import Result, Timing, Verdict

SHORT_S = 0.02
MOST_REPEATS = 50
ROUNDS = {"cpu": 5, "cuda": 20}
WARM_UPS = {"cpu": 1, "cuda": 3}
MEMORY_PROCESSES = {"cpu": 2, "cuda": 4}  # at a time; memory needs no quiet processor


def asked_for(cases: Iterable[Case], only: str | None) -> list[Case]:
    """The cases whose name holds `only`; the extra ones, where it begins theirs."""
    if only is None:
        return [case for case in cases if not case.extra]
    return [case for case in cases if (case.name.startswith(only) if case.extra else only in case.name)]


def run_benchmark(
    name: str,
    cases: Iterable[Case],
    device: str = "cpu",
    rounds: int | None = None,
    memory: bool = False,
    who: Collection[str] = (),
    report: Callable[[Result, str], None] | None = None,
) -> Result:
    """Times every case, then measures memory; `report(result, case)` is called as each case is timed.

    `who` leaves out contestants whose name holds none of its texts; empty leaves out none.
    """
    result = Result(
        name, device, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", machine.describe(device), machine.versions(),
        machine.commit(), warning=machine.load_warning(),
    )  # fmt: skip
    cases, quiet = list(cases), machine.Quietness()
    for case in cases:
        result.timings += time_case(case, rounds or case.rounds or ROUNDS[device], device, who)
        if report:
            report(result, case.name)
    result.others = quiet.others()
    if memory:
        _measure_memory(result, [case for case in cases if case.memory])
    result.verdicts = [verdict for case in cases for verdict in judge(case, result.timings) + checked(case)]
    return result


def time_case(case: Case, rounds: int, device: str = "cpu", who: Collection[str] = ()) -> list[Timing]:
    """Times every contestant of `case`, interleaved, after warming each up; those that cannot run say why."""
    contestants = {n: c for n, c in case.build(False).items() if not who or any(text in n for text in who)}
    found = {name: Timing(case.name, name, tokens=case.tokens.get(name)) for name in contestants}
    runs: dict[str, Run] = {}
    repeats: dict[str, int] = {}
    for name, prepare in contestants.items():
        try:
            runs[name], repeats[name] = (prepare(), 1) if case.warmed else _warmed_up(prepare, device, case.clock)
        except Unavailable as why:
            found[name].unavailable = str(why)
        except RuntimeError as error:
            found[name].unavailable = _failed(name, error)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.freeze()  # what is there now (the libraries' modules, mostly) takes 0.2 s to go through, each time
    order = list(runs.items())
    for turn in range(rounds):
        gc.collect()  # who comes first after it has the coldest caches: each in turn
        first = turn % len(order) if order else 0
        for name, run in order[first:] + order[:first]:
            if not found[name].unavailable and within_budget(case, seconds[name], repeats[name]):
                try:
                    seconds[name].append(_seconds(run, device, repeats[name], case.clock))
                except RuntimeError as error:
                    found[name].unavailable = _failed(name, error)
    gc.unfreeze()
    timed = {name: timing for name, timing in found.items() if name in runs and not timing.unavailable}
    for name, timing in timed.items():
        s = seconds[name]
        timing.median_s, timing.min_s, timing.max_s, timing.rounds = statistics.median(s), min(s), max(s), len(s)
    base = timed[case.base].cost if case.base in timed else None
    for name, measure in (case.measured() if case.measured else {}).items():
        found[name].peak_bytes, found[name].figures = measure.peak_bytes, dict(measure.figures)
    for timing in timed.values():
        timing.ratio = base / timing.cost if base and timing.cost else None
    return list(found.values())


def _failed(name: str, error: RuntimeError) -> str:
    """Of a compiler, a driver or memory: the others' times are still wanted, but not without ours."""
    if name == OURS:
        raise error
    return f"fails: {(str(error).splitlines() or [''])[0][:60]}"


def _warmed_up(prepare: Prepare, device: str, clock: Callable[[], float] = time.perf_counter) -> tuple[Run, int]:
    """A contestant's run, and how often to repeat it in a round."""
    run = prepare()
    warm = min(_seconds(run, device, 1, clock) for _ in range(WARM_UPS[device]))
    if warm < SHORT_S:
        # the first run of a short piece of work is mostly its libraries waking up
        warm = _seconds(run, device, 1, clock)
    return run, min(MOST_REPEATS, math.ceil(SHORT_S / warm))


def within_budget(case: Case, taken: list[float], repeats: int) -> bool:
    """Whether one more round fits, going by the mean of those so far."""
    if len(taken) < case.least_rounds:
        return True
    return repeats * (sum(taken) + statistics.mean(taken)) <= case.budget_s


def _seconds(run: Run, device: str, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean time of a run; the last result is dropped after the clock stopped."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            kept = run()
        end.record()
        torch.cuda.synchronize()
        taken = begin.elapsed_time(end) / 1e3
    else:
        start = clock()
        for _ in range(repeats):
            kept = run()
        taken = clock() - start
    del kept
    return taken / repeats


def _measure_memory(result: Result, cases: list[Case]) -> None:
    names = {case.name for case in cases}
    todo = [t for t in result.timings if t.case in names and not t.unavailable]

    def measure(timing: Timing) -> None:
        try:
            timing.peak_bytes = peak_in_fresh_process(result.benchmark, result.device, timing.case, timing.contestant)
        except (RuntimeError, OSError, ValueError, TimeoutExpired) as error:  # the times stay good: say it and go on
            print(f"warning: {error}", file=sys.stderr)

    with ThreadPoolExecutor(MEMORY_PROCESSES[result.device]) as pool:
        list(pool.map(measure, todo))


def judge(case: Case, timings: list[Timing]) -> list[Verdict]:
    """The case's targets beside the measured ratios."""
    rows = {t.contestant: t for t in timings if t.case == case.name}
    verdicts = []
    for target in case.targets:
        value = operator.attrgetter("cost" if target.quantity == "time" else "peak_bytes")
        rival = _rival(rows, target, value)
        mine, theirs = (None if t is None else value(t) for t in (rows.get(OURS), rival))
        theirs = theirs if target.over else 1.0
        ratio = None if mine is None or theirs is None else target.ratio(mine, theirs)
        met = target.met(ratio) if ratio is not None else None
        over = rival.contestant if rival else target.over
        verdicts.append(Verdict(case.name, over, target.quantity, target.bound(), ratio, met))
    return verdicts


def _rival(rows: dict[str, Timing], target: Target, value: Callable[[Timing], float | None]) -> Timing | None:
    """Whom a target speaks of: the one with this name, or the best of those whose names begin so."""
    if not target.over or target.over in rows:
        return rows.get(target.over)
    ran = [t for t in rows.values() if t.contestant.startswith(target.over) and value(t) is not None]
    return min(ran, key=lambda t: value(t) or 0.0, default=None)


def checked(case: Case) -> list[Verdict]:
    """The case's checks as verdicts; none where what they compare with cannot run here."""
    try:
        found = case.checks() if case.checks else []
    except Unavailable:
        return []
    return [Verdict(case.name, c.what, c.quantity, c.bound(), c.error, c.error <= c.at_most) for c in found]
