"""`make gpu`: its stages end in time, fail apart from one another, and it says so where there is no device."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, runner, small_shapes
from benchmarks.registry import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
INITIALISED = ("head", "logprob", "lora", "others", "attention")  # whose reads of memory never written are looked for


def python(code: str, name: str = "stage", limit_s: float = 30.0, **options) -> gpu.Stage:
    return gpu.Stage(name, (sys.executable, "-c", code), limit_s, **options)


def hidden_device(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **variables}


def test_without_a_device_it_ends_with_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=hidden_device(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no CUDA device" in done.stderr


def test_the_make_target_calls_it_with_the_python_asked_for():
    done = subprocess.run(
        ["make", "gpu", f"GPU_PYTHON={sys.executable}"], cwd=ROOT, env=hidden_device(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"no CUDA device for {sys.executable}" in done.stderr


def test_a_failing_stage_does_not_stop_the_later_ones(tmp_path, capsys):
    todo = [
        python("print('fine')", "one"),
        python("import sys; print('broken'); sys.exit(7)", "two"),
        python("print('never')", "three", missing="no such tool"),
        python("import os; print(os.environ['GIVEN'])", "four", environment={"GIVEN": "passed on"}),
    ]
    outcomes = gpu.run_all(todo, tmp_path)
    assert [(o.status, o.returncode) for o in outcomes] == [("ok", 0), ("failed", 7), ("missing", None), ("ok", 0)]
    assert (tmp_path / "two.log").read_text() == "broken\n"
    assert (tmp_path / "three.log").read_text() == "no such tool\n"
    assert "passed on" in capsys.readouterr().out
    shown = gpu.summary(outcomes)
    assert len(shown.splitlines()) == 5
    assert "two                  failed        7" in shown


def test_a_stage_that_takes_too_long_is_ended_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    begin = time.monotonic()
    (outcome,) = gpu.run_all([python(code, limit_s=1.0)], tmp_path)
    assert (outcome.status, outcome.returncode) == ("timed out", None)
    assert time.monotonic() - begin < 20
    time.sleep(3.5)
    assert not alive.exists()


def test_no_stage_runs_beyond_the_time_left_for_all(tmp_path):
    todo = [python("import time; time.sleep(60)", name, 50.0) for name in ("one", "two")]
    begin = time.monotonic()
    outcomes = gpu.run_all(todo, tmp_path, whole_s=2.0)
    assert [o.status for o in outcomes] == ["timed out", "timed out"]
    assert time.monotonic() - begin < 20


def test_it_builds_tests_sanitizes_and_benchmarks_but_installs_nothing(tmp_path):
    todo = gpu.stages(tmp_path, list(BENCHMARKS))
    names = [stage.name for stage in todo]
    assert names[:4] == ["build", "tests", "memcheck", "racecheck"]
    assert [name for name in names if name.startswith("initcheck")] == [f"initcheck {op}" for op in INITIALISED]
    assert [name for name in names if name.startswith("benchmark")] == [f"benchmark {name}" for name in BENCHMARKS]
    for stage in todo:
        assert not {"pip", "install"} & set(stage.command)
        assert sys.executable in stage.command
        assert stage.limit_s <= (240 if stage.name == "benchmark generation" else 150)
    assert sum(stage.limit_s for stage in todo if not stage.name.startswith("benchmark")) <= gpu.WHOLE_S - 120


def test_of_the_long_benchmark_the_gpu_stage_runs_what_there_is(tmp_path):
    """Its options name a case with targets, and contestants of it."""
    (stage,) = [stage for stage in gpu.stages(tmp_path, list(BENCHMARKS)) if stage.name == "benchmark generation"]
    options = stage.command[stage.command.index("--only") :]
    (case,) = runner.asked_for(BENCHMARKS["generation"]("cuda"), options[1])
    assert case.targets
    for who in options[options.index("--who") + 1 :]:
        assert any(who in name for name in case.tokens)


@pytest.mark.parametrize("ops", [*INITIALISED, "others"])
def test_the_small_shapes_for_the_sanitizers_run(ops, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_shapes", "--ops", ops])
    monkeypatch.setattr("torch.set_default_device", lambda device: None)
    small_shapes.main()
    assert capsys.readouterr().out == f"{ops}: done\n"
