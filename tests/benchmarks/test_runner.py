"""The benchmarks' harness: who takes part, what a result file keeps, what the tables say, and what memory counts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import machine, memory, peers, runner, tables
from benchmarks.case import OURS, Case, Check, Target, Unavailable, ready
from benchmarks.head import MODELS, NAMES, SMALL, cases, contestant, gemms_alone, make_inputs
from benchmarks.result import Result, Timing, Verdict

TINY = replace(SMALL, rows=6, width=32, vocab=200)


class Clock:
    """Time that passes only when a contestant says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def contestant(self, name: str, seconds: float):
        def run() -> None:
            self.now += seconds
            self.ran.append(name)

        return ready(run)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    return clock


def absent():
    raise Unavailable("not installed")


def race(clock: Clock, **changes) -> Case:
    contestants = {"slow": clock.contestant("slow", 3.0), OURS: clock.contestant(OURS, 1.0), "gone": absent}
    return replace(Case("race", lambda tiny: contestants, "slow"), **changes)


def test_speeds_are_relative_to_the_base_and_whoever_cannot_run_says_why(clock):
    slow, ours, gone = runner.time_case(race(clock), rounds=3)
    assert (slow.ratio, ours.ratio) == (1.0, pytest.approx(3.0))
    assert (ours.min_s, ours.median_s, ours.max_s, ours.rounds) == (1.0, 1.0, 1.0, 3)
    assert (gone.median_s, gone.rounds, gone.unavailable) == (None, 0, "not installed")


@pytest.mark.parametrize(("budget", "rounds"), [(100.0, 4), (7.0, 2), (1e-9, 1)])
def test_a_slow_contestant_runs_as_often_as_its_budget_allows(clock, budget, rounds):
    slow, ours, _ = runner.time_case(race(clock, budget_s=budget), rounds=4)
    assert slow.rounds == rounds
    assert ours.rounds == min(4, max(1, int(budget)))
    assert runner.time_case(race(clock, budget_s=budget, least_rounds=3), rounds=4)[0].rounds == max(rounds, 3)


def test_a_peer_that_fails_says_so_and_ours_stops_the_run(clock):
    def fails():
        raise RuntimeError("out of registers\nat line 3")

    contestants = {"slow": clock.contestant("slow", 3.0), "broken": ready(fails)}
    slow, broken = runner.time_case(Case("race", lambda tiny: contestants, "slow"), rounds=1)
    assert (slow.rounds, broken.median_s, broken.unavailable) == (1, None, "fails: out of registers")
    with pytest.raises(RuntimeError, match="out of registers"):
        runner.time_case(Case("race", lambda tiny: {OURS: ready(fails)}, OURS), rounds=1)


def test_a_peer_that_fails_in_a_round_drops_out(clock):
    runs = iter([None, RuntimeError("out of memory")])

    def run() -> None:
        clock.now += 1.0
        error = next(runs)
        if error:
            raise error

    contestants = {"slow": clock.contestant("slow", 3.0), "greedy": ready(run)}
    slow, greedy = runner.time_case(Case("race", lambda tiny: contestants, "slow"), rounds=3)
    assert (slow.rounds, greedy.median_s, greedy.unavailable) == (3, None, "fails: out of memory")


def test_contestants_that_warm_themselves_up_run_in_the_rounds_only(clock):
    runner.time_case(race(clock, warmed=True), rounds=2)
    assert clock.ran == ["slow", OURS, OURS, "slow"]


def test_where_tokens_are_counted_speeds_and_targets_are_of_times_a_token(clock):
    case = race(clock, tokens={"slow": 30, OURS: 100}, targets=(Target("slow", at_least=9),))
    timings = runner.time_case(case, rounds=1)
    assert timings[1].ratio == pytest.approx(10)  # 0.1 s a token against 0.01
    (verdict,) = runner.judge(case, timings)
    assert (verdict.measured, verdict.met) == (pytest.approx(10), True)
    assert tables.columns(timings)[1] == tables.RATE
    assert [row[1] for row in tables.rows(timings)] == ["10", "100", ""]
    assert tables.RATE not in tables.columns(runner.time_case(race(clock), rounds=1))


def test_a_target_may_speak_of_the_best_of_several(clock):
    timings = [Timing("race", "batch 1", 4.0), Timing("race", "batch 2", 3.0), Timing("race", OURS, 1.0)]
    timings += [Timing("race", "batch 3", unavailable="needs a GPU"), Timing("race", "other", 2.0)]
    (verdict,) = runner.judge(race(clock, targets=(Target("batch", at_least=3),)), timings)
    assert verdict.sentence() == "3.00x faster than batch 2: target >= 3, met"
    (verdict,) = runner.judge(race(clock, targets=(Target("batch", at_least=3),)), timings[-3:])
    assert verdict.sentence() == "time against batch: not measured, target >= 3"


def test_only_some_contestants_can_be_asked_for(clock):
    assert [t.contestant for t in runner.time_case(race(clock), 1, who=["rlhf", "go"])] == [OURS, "gone"]
    assert clock.ran == [OURS, OURS]


def test_contestants_take_turns(clock):
    runner.time_case(race(clock), rounds=2)
    assert clock.ran == ["slow", OURS, "slow", OURS, OURS, "slow"]  # warm-ups, then two rounds, each begun by another


def test_a_short_run_is_repeated_and_its_mean_taken(clock):
    build = {"quick": clock.contestant("quick", runner.SHORT_S / 8)}
    (quick,) = runner.time_case(Case("quick", lambda tiny: build, "quick"), rounds=1)
    assert len(clock.ran) == 2 + 8  # warm-up, its repetition, one round of eight
    assert quick.median_s == pytest.approx(runner.SHORT_S / 8)


def test_targets_are_judged_by_ratio_by_memory_and_in_absolute_terms(clock):
    targets = (
        Target("slow", at_least=4), Target("slow", at_most=0.5), Target("slow", "memory", at_least=3),
        Target(at_most=0.02), Target(quantity="memory", at_most=5.0), Target("gone", at_least=1),
    )  # fmt: skip
    timings = [Timing("race", "slow", 0.3, peak_bytes=20), Timing("race", OURS, 0.1, peak_bytes=10)]
    verdicts = runner.judge(
        race(clock, targets=targets), [*timings, Timing("race", "gone", unavailable="not installed")]
    )
    measured = [(v.measured, v.met) for v in verdicts]
    assert measured == [
        (pytest.approx(3), False), (pytest.approx(1 / 3), True), (2, False), (0.1, False), (10, False), (None, None),
    ]  # fmt: skip
    assert verdicts[0].sentence() == "3.00x faster than slow: target >= 4, missed"
    assert verdicts[1].sentence() == "0.33x the time of slow: target <= 0.5, met"
    assert verdicts[2].sentence() == "2.0x less memory than slow: target >= 3, missed"
    assert verdicts[3].sentence() == "100.0 ms: target <= 20 ms, missed"
    assert verdicts[5].sentence() == "time against gone: not measured, target >= 1"


def test_what_a_case_checks_becomes_a_verdict(clock):
    def checks() -> list[Check]:
        return [Check("the loss", 3e-7, 1e-6), Check("gradients", 0.5, 1e-5), Check("y", float("nan"), 1.0)]

    verdicts = runner.run_benchmark("lora", [race(clock, checks=checks)], rounds=1).verdicts
    assert [v.met for v in verdicts] == [True, False, False]
    assert verdicts[0].sentence() == "the loss: relative error 3.0e-07: target <= 1e-06, met"
    assert runner.checked(race(clock, checks=absent)) == []

    def shares() -> list[Check]:
        return [Check("host share", 0.0612, 0.05, "share"), Check("tokens that differ", 0, 0, "count")]

    share, count = runner.checked(race(clock, checks=shares))
    assert share.sentence() == "host share: 6.12 %: target <= 5 %, missed"
    assert count.sentence() == "tokens that differ: 0: target <= 0, met"


@pytest.mark.parametrize(
    ("only", "names"), [(None, ["race"]), ("ace", ["race"]), ("rac", ["race", "race far"]), ("far", [])]
)
def test_an_extra_case_runs_only_where_its_name_is_begun(clock, only, names):
    listed = [race(clock), race(clock, name="race far", extra=True)]
    assert [case.name for case in runner.asked_for(listed, only)] == names


def test_a_case_may_want_its_own_number_of_rounds(clock):
    case = race(clock, rounds=2)
    assert {t.rounds for t in runner.run_benchmark("lora", [case]).timings if not t.unavailable} == {2}
    assert {t.rounds for t in runner.run_benchmark("lora", [case], rounds=3).timings if not t.unavailable} == {3}


@pytest.fixture
def result(clock) -> Result:
    return runner.run_benchmark("head", [race(clock, targets=(Target("slow", at_least=2),))], rounds=1)


def test_a_result_survives_its_file(result, tmp_path):
    path = tmp_path / "new" / "result.json"
    result.write(path)
    assert Result.read(path) == result


@pytest.mark.parametrize("text", ["{}", "[]", "not json", '{"timings": [{"no": 1}], "verdicts": []}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a result"):
        Result.read(path)


def test_a_result_names_machine_versions_commit_and_whether_it_was_quiet(result):
    assert result.machine["cpu"]
    assert set(result.machine["isa"]) <= set(machine.BF16_ISA)
    assert result.machine["threads"] == torch.get_num_threads()
    assert result.versions["torch"] == torch.__version__
    assert result.others is None or 0 <= result.others <= 1
    assert result.warning == "" or "quiet" in result.warning


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (30.0, True)])
def test_a_busy_machine_is_warned_about(monkeypatch, load, warned):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    assert bool(machine.load_warning()) is warned


def test_markdown_has_every_contestant_its_verdict_and_the_gpu_table_as_not_measured(result):
    text = tables.markdown([result])
    assert "| gone | not installed |" in text
    assert f"| **{OURS}** |" in text
    assert "- " + result.verdicts[0].sentence() in text
    assert "`head` on an H200: not measured" in text
    assert "<= 27 ms" in text
    assert "| <= 1.1 times the time of frozen linear | not measured |" in text
    measured = [replace(result, benchmark=name) for name in tables.BENCHED]
    measured += [replace(one, device="cuda", machine={"gpu": "H200"}) for one in measured]
    assert "not measured" not in tables.markdown(measured)
    assert tables.markdown([]).count(": not measured") == 2 * len(tables.BENCHED)


def test_the_terminal_table_shows_what_the_file_holds(result, capsys):
    tables.print_case(result, "race")
    shown = capsys.readouterr().out
    assert "not installed" in shown
    assert "target >= 2" in shown


def test_tables_are_written_between_their_markers_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables:begin -->\nold\n<!-- tables:end -->\nafter\n")
    tables.write_between(page, "tables", "new")
    assert page.read_text() == "before\n<!-- tables:begin -->\n\nnew\n\n<!-- tables:end -->\nafter\n"
    with pytest.raises(ValueError, match="no lines"):
        tables.write_between(page, "numerics", "new")


@pytest.mark.parametrize("work", ["score", "entropy", "frozen", "trained", "kl"])
def test_every_installed_peer_does_the_same_work(work):
    """The contestants are comparable: what they return agrees with ours on the same inputs."""
    inputs = make_inputs(TINY, "cpu", trained=work == "trained")
    expected = flat(contestant(peers.ours("cpu"), work, inputs)())
    compared = 0
    for name, load in peers.HEADS.items():
        try:
            head = load("cpu")
        except Unavailable:
            continue
        lacks = {
            "kl": head.divergence is None,
            "entropy": head.entropy is None,
            "frozen": head.scoring_only,
            "trained": head.scoring_only or head.frozen_only,
        }
        if lacks.get(work) or "compile" in name:  # compiling takes a minute and is torch's to test
            continue
        found = flat(contestant(head, work, inputs)())
        assert len(found) == len(expected)
        for a, b in zip(found, expected):
            torch.testing.assert_close(
                a.float(), b.float(), rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
        compared += 1
    assert compared >= 2


def flat(found) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else [x for part in found for x in flat(part)]


@pytest.mark.parametrize(("work", "gemms"), [("score", 1), ("frozen", 2), ("trained", 3), ("kl", 2)])
def test_the_yardstick_runs_the_gemms_of_the_work_and_nothing_else(work, gemms):
    run = gemms_alone(work, make_inputs(TINY, "cpu", trained=False))
    run()  # makes its buffers
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.pop("aten::mm") == gemms
    assert not any(name.startswith(("aten::copy", "aten::empty", "aten::add", "aten::mul")) for name in counts)


@pytest.mark.parametrize(("device", "targets"), [("cpu", 6), ("cuda", 6)])
def test_cases_have_distinct_names_and_carry_the_targets(device, targets):
    """Listing the cases makes no inputs, so a machine without the device can list them."""
    listed = list(cases(device))
    assert len({case.name for case in listed}) == len(listed)
    assert sum(len(case.targets) for case in listed) == targets
    for model in MODELS:
        for work in ("score", "frozen", "trained"):
            shape = f"x {model.width} x {model.vocab} bf16 ({model.model})"
            assert sum(case.name.startswith(NAMES[work]) and case.name.endswith(shape) for case in listed) == 1


def test_a_library_that_is_missing_or_broken_is_unavailable_with_its_reason():
    with pytest.raises(Unavailable, match=r"^not installed$"):
        peers.attribute("surely_no_such_library.part", "name")
    with pytest.raises(Unavailable, match="does not import"):
        peers.attribute("json", "no_such_name")
    with pytest.raises(Unavailable, match=r"needs a GPU|not installed"):
        peers.cce("cpu")


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.recorded = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.recorded
        assert end.recorded
        return 250.0  # milliseconds


def test_on_a_gpu_times_come_from_events_and_peaks_from_the_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    run = lambda: calls.append("run")  # noqa: E731
    assert runner._seconds(run, "cuda", repeats=5) == pytest.approx(0.05)
    assert calls == ["synchronize", *["run"] * 5, "synchronize"]
    calls.clear()
    memory.settle("cuda")
    assert calls == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert (memory.held_bytes("cuda"), memory.peak_bytes("cuda")) == (1000, 5000)
    assert calls[3:] == ["synchronize"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is what happens without a GPU")
def test_asking_for_a_gpu_where_there_is_none_is_an_error():
    failed = subprocess.run(command("gae", "--device", "cuda"), cwd=machine.ROOT, capture_output=True, text=True)
    assert failed.returncode != 0
    assert "no CUDA device" in failed.stderr


def holds(mebibytes: int) -> Case:
    def build(tiny: bool):
        size = 1024 if tiny else mebibytes * 2**20
        return {"filler": ready(lambda: torch.ones(size, dtype=torch.uint8))}

    return Case("fill", build, "filler")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be set back on Linux only")
def test_peak_memory_is_what_a_run_adds_however_high_the_peak_was_before():
    torch.ones(256 * 2**20, dtype=torch.uint8)  # dropped at once: an earlier peak
    peak = memory.peak_of(holds(64), "filler", "cpu")
    assert 62 < peak / 2**20 < 80


def test_the_command_line_measures_a_contestants_memory_in_a_process_of_its_own():
    peak = memory.peak_in_fresh_process("gae", "cpu", "256 x 1024 fp32", OURS)
    assert 2**20 < peak < 2**26


def test_the_command_line_writes_a_result_and_its_table(tmp_path):
    path = tmp_path / "gae.json"
    run("gae", "--rounds", "1", "--json", str(path))
    assert {t.contestant for t in Result.read(path).timings} == {"python loop", OURS}
    assert "python loop" in run("table", str(path))
    failed = subprocess.run(
        command("gae", "--only", "nothing like it"), cwd=machine.ROOT, capture_output=True, text=True
    )
    assert failed.returncode != 0
    assert "256 x 1024 fp32" in failed.stderr  # says what there is


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", *arguments]


def run(*arguments: str) -> str:
    return subprocess.run(command(*arguments), cwd=machine.ROOT, capture_output=True, text=True, check=True).stdout


def test_a_verdict_without_numbers_is_neither_met_nor_missed():
    assert Verdict("c", "eager", "memory", ">= 20", None, None).sentence() == (
        "memory against eager: not measured, target >= 20"
    )
