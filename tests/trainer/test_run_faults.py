"""What goes wrong on real machines: kills inside a write, full disks, damaged and foreign checkpoints, two runs at
once, signals. No checkpoint before is lost, and the user reads one line.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_resume import curve

from rlhf_trainer import checkpoint, signals, sums, train
from rlhf_trainer.checkpoint import Checkpoint
from rlhf_trainer.cli import main
from rlhf_trainer.errors import UserError
from rlhf_trainer.lock import DirectoryLock
from rlhf_trainer.signals import Interrupted, Stop, Terminated

STEPS = 4
SAVING = "a checkpoint is saved before leaving"  # of the first signal, at once
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "SHA256SUMS")


def made(step):
    tensors = {"w": torch.full((300,), float(step)), "b": torch.ones(3)}
    return Checkpoint(step, tensors, {"exp_avg.w": torch.ones(300)}, {"phase": {}})


def settings(directory, name="out", algorithm="hydra-ppo", **changes):
    """A run of four steps that saves each."""
    changes = {"total_steps": STEPS, "save_steps": 1, "output_dir": str(directory / name)} | changes
    return tiny.config(directory, algorithm, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an undisturbed run, `whole`, with its model and data."""
    directory = tmp_path_factory.mktemp("faults")
    train(settings(directory, "whole"))
    return directory


@pytest.fixture(autouse=True)
def sigint():
    """SIGINT as a terminal's process has it: what a shell starts in the background ignores it, and so do its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def out(whole):
    """Where a disturbed run goes, beside the undisturbed one."""
    yield whole / "out"
    shutil.rmtree(whole / "out", ignore_errors=True)


def same_as_whole(whole, out):
    """Metrics, weights and optimiser state of a finished run are those of the undisturbed one."""
    assert curve(out) == curve(whole / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected, got = (load_file(run / f"checkpoint-{STEPS}" / name) for run in (whole / "whole", out))
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def error_line(capsys):
    """The one line on stderr, warnings aside."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line and "warning" not in line and SAVING not in line
    ]
    assert len(lines) == 1, lines
    return lines[0]


# kills inside a write


def _killed_at(operation, work):
    """Runs `work` in a fork that kills itself before its change number `operation` to the disk; whether it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def counting(function):
            def counted(*args, **kwargs):
                nonlocal seen
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                return function(*args, **kwargs)

            return counted

        for module, name in (
            (os, "mkdir"), (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"),
            (checkpoint, "save_file"), (Path, "write_text"),
        ):  # fmt: skip
            setattr(module, name, counting(getattr(module, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_before_any_of_a_saves_changes_to_the_disk_leaves_a_whole_newest_checkpoint(tmp_path):
    newest = []
    for operation in range(100):
        place = tmp_path / str(operation)
        for step in (1, 2):
            checkpoint.save(place, made(step), keep=2)
        killed = _killed_at(operation, lambda place=place: checkpoint.save(place, made(3), keep=2))
        checkpoint.check(place)
        found = checkpoint.load(place)
        assert torch.equal(found.model["w"], made(found.step).model["w"])
        assert not list(place.glob(".partial-*"))
        newest.append(found.step)
        checkpoint.save(place, made(3), keep=2)  # what the resumed run does next
        assert checkpoint.load(place).step == 3
        if not killed:
            break
    assert newest == sorted(newest)
    assert newest.count(2) >= 10  # of the writing
    assert newest.count(3) >= 5  # of the deletion of checkpoint-1 after it
    assert not killed


# full disks


@contextmanager
def files_at_most(size):
    """The kernel refuses to write files beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 300, 1000, 2000, 5500])
def test_a_save_that_the_kernel_refuses_leaves_the_checkpoint_before(tmp_path, size):
    checkpoint.save(tmp_path, made(1), keep=1)
    with files_at_most(size), pytest.raises(Exception, match=r"too large|os error 27"):
        checkpoint.save(tmp_path, made(2), keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoint.check(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 1 MiB; skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk, leave):
    """Leaves `leave` bytes on the disk."""
    free = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        file.write(bytes(max(free.f_bavail * free.f_frsize - leave, 0)))


@pytest.mark.parametrize("leave", [0, 40, 200, 440])
def test_a_full_disk_is_one_line_at_any_moment_and_the_run_goes_on_when_there_is_space(
    whole, small_disk, capsys, leave
):
    """leave: KiB on the disk: for nothing at all, for the log, for a checkpoint, for the last one but for a part."""
    fill(small_disk, leave * 1024)
    out = small_disk / "out"
    settings(whole, output_dir=str(out)).to_yaml(whole / "run.yaml")
    assert main(["--config", str(whole / "run.yaml")]) == 2
    line = error_line(capsys)
    assert "No space left on device" in line or "os error 28" in line, line
    assert line.startswith("rlhf-train: error: output_dir: writing to ")
    checkpoint.check(out)
    (small_disk / "filler").unlink()
    words = ["--output", str(out), "--resume"] if (out / "config.yaml").exists() else ["--config", f"{whole}/run.yaml"]
    assert main(words) == 0
    same_as_whole(whole, out)


@pytest.mark.parametrize("leave", [16, 56])
def test_a_disk_too_full_for_the_result_leaves_the_former_result_and_checkpoints(whole, small_disk, capsys, leave):
    """leave: KiB, for a part of the adapters; for all but the tokenizer."""
    out = small_disk / "out"
    train(settings(whole, output_dir=str(out)))
    before = (out / "actor" / "adapter_model.safetensors").read_bytes()
    fill(small_disk, leave * 1024)
    assert main(["--output", str(out), "--resume"]) == 2
    assert "writing to" in error_line(capsys)
    assert (out / "actor" / "adapter_model.safetensors").read_bytes() == before
    same_as_whole(whole, out)


def test_a_full_disk_does_not_cost_the_configuration_of_the_run_to_go_on_with(whole, out, small_disk, capsys):
    train(settings(whole, output_dir=str(small_disk / "out"), total_steps=1))
    before = (small_disk / "out" / "config.yaml").read_text()
    fill(small_disk, 0)
    assert main(["--output", str(small_disk / "out"), "--resume", "--total-steps", "2"]) == 2
    assert "writing to" in error_line(capsys)
    assert (small_disk / "out" / "config.yaml").read_text() == before


# damaged checkpoints


def flip(path):
    """One bit in the middle of the file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def turn_into_a_directory(path):
    path.unlink()
    path.mkdir()


def cut_to(share):
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


DAMAGES = {
    "bit-flipped": (flip, "not what was written|not among"),
    "truncated": (cut_to(0.5), "not what was written|not a whole list"),
    "one-byte-short": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "not what was written|not a whole list",
    ),
    "empty": (cut_to(0), "not what was written|not among"),
    "missing": (lambda path: path.unlink(), "missing"),
    "unreadable": (turn_into_a_directory, "directory"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_before_anything_is_read_from_it(tmp_path, damage, file):
    for step in (1, 2):
        checkpoint.save(tmp_path, made(step), keep=2)
    change, words = DAMAGES[damage]
    change(tmp_path / "checkpoint-2" / file)
    with pytest.raises(UserError, match=rf"checkpoint-2' is damaged \([\w.]+: .*({words}).*goes on from checkpoint-1$"):
        checkpoint.check(tmp_path)


def test_what_a_sum_cannot_tell_is_an_error_of_one_line_too(tmp_path):
    checkpoint.save(tmp_path, made(1), keep=2)
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"half")
    sums.write(tmp_path / "checkpoint-1")
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=r"checkpoint-1' is damaged \(.*the beginning, as there is none before it$"):
        checkpoint.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_by_doing_what_the_line_says(whole, out, capsys):
    train(settings(whole, total_steps=3))
    flip(out / "checkpoint-3" / "optimizer.safetensors")
    for _ in range(2):  # asking again does not make it go on
        assert main(["--output", str(out), "--resume", "--total-steps", str(STEPS)]) == 2
        line = error_line(capsys)
        assert "checkpoint-3' is damaged (optimizer.safetensors: not what was written)" in line
        assert "goes on from checkpoint-2" in line
    assert checkpoint.steps(out) == [2, 3]
    subprocess.run(line.split("`")[1], shell=True, check=True)
    assert main(["--output", str(out), "--resume", "--total-steps", str(STEPS)]) == 0
    same_as_whole(whole, out)


def test_sums_are_those_of_sha256sum(tmp_path):
    checkpoint.save(tmp_path, made(1), keep=1)
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "checkpoint-1", check=True)


# foreign checkpoints


def replace_checkpoint(out, source):
    """Puts `source` in the place of the newest checkpoint, under the configuration that stands there."""
    target = out / f"checkpoint-{checkpoint.steps(out)[-1]}"
    state = json.loads((target / "state.json").read_text())
    shutil.rmtree(target)
    shutil.copytree(source, target)
    (target / "state.json").write_text(json.dumps(json.loads((source / "state.json").read_text()) | state))
    sums.write(target)


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        ({"algorithm": "remax", "lora_r": 0}, "of another model or other adapters: the "),
        ({"lora_r": 2}, r"lora_A\S* is float32 \(2, \d+\) in it and float32 \(4, \d+\) in the model"),
        ({"lora_target_modules": "q_proj"}, "the model has '.*lora_A.*' and the checkpoint does not"),
    ],
    ids=["algorithm", "rank", "targets"],
)
def test_a_checkpoint_of_another_run_is_refused_by_its_tensors(whole, out, foreign, words):
    train(settings(whole, total_steps=1))
    train(settings(whole, "foreign", total_steps=1, **foreign))
    replace_checkpoint(out, whole / "foreign" / "checkpoint-1")
    shutil.rmtree(whole / "foreign")
    with pytest.raises(UserError, match=rf"^resume: checkpoint-1 is .*{words}"):
        train(settings(whole, resume=True))
    assert checkpoint.steps(out) == [1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "j-hydra-ppo"}, "algorithm was 'hydra-ppo' in the checkpoint and is 'j-hydra-ppo' now"),
        ({"lora_r": 2}, "lora_r was 4 in the checkpoint and is 2 now"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules was 'all-linear'"),
    ],
    ids=["algorithm", "rank", "targets"],
)
def test_another_algorithm_or_other_adapters_are_refused_by_the_settings(whole, out, changes, words):
    train(settings(whole, total_steps=1))
    with pytest.raises(UserError, match=f"^resume: {words}"):
        train(settings(whole, resume=True, **changes))


def test_a_base_that_was_changed_under_the_same_path_is_refused(tmp_path):
    train(settings(tmp_path, total_steps=1))
    tiny.checkpoint(tmp_path / "model", seed=5)
    with pytest.raises(UserError, match=r"^resume: checkpoint-1 is of a run on other frozen weights"):
        train(settings(tmp_path, resume=True))


def test_a_reward_head_that_was_changed_is_refused_too(tmp_path):
    train(settings(tmp_path, total_steps=1))
    save_file({"reward.weight": torch.ones(1, 32)}, tmp_path / "model" / "heads.safetensors")
    with pytest.raises(UserError, match=r"^resume: checkpoint-1 is of a run on other frozen weights"):
        train(settings(tmp_path, resume=True))


# two runs in one directory

HOLD = """
import sys, time
from pathlib import Path
from rlhf_trainer.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("resume", [False, True], ids=["fresh", "resumed"])
def test_a_second_run_is_refused_while_one_is_at_work_and_let_in_after_a_kill(whole, out, resume):
    if resume:
        train(settings(whole, total_steps=1))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout.readline() == b"held\n"
        before = sorted(out.rglob("*"))
        with pytest.raises(UserError, match=rf"another run is at work in '.*out' \(process {first.pid} on "):
            train(settings(whole, resume=resume))
        assert sorted(out.rglob("*")) == before
        first.kill()
    train(settings(whole, resume=resume))
    same_as_whole(whole, out)


def test_a_run_that_begins_while_this_one_loads_its_model_is_noticed(whole, out, monkeypatch):
    from rlhf_trainer import core

    build = core.build_phase

    def slow(*args):
        made = build(*args)
        train_other()
        return made

    def train_other():
        monkeypatch.setattr(core, "build_phase", build)
        train(settings(whole, total_steps=1))

    monkeypatch.setattr(core, "build_phase", slow)
    with pytest.raises(UserError, match="already holds checkpoints"):
        train(settings(whole))
    assert checkpoint.steps(out) == [1]


def test_a_lock_is_taken_once_and_given_back(tmp_path):
    with DirectoryLock(tmp_path) as lock:
        assert not lock.take(make=False)  # no run was ever here
        assert list(tmp_path.iterdir()) == []
        assert lock.take()
        assert not lock.take()
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):
            DirectoryLock(tmp_path).take()
    assert DirectoryLock(tmp_path).take(make=False)


def test_a_demo_does_not_clear_the_folder_of_one_that_is_at_work(tmp_path):
    from rlhf_trainer.demo.run import fresh_folder

    fresh_folder(tmp_path / "demo")
    with DirectoryLock(tmp_path / "demo" / "hydra-sft") as lock:
        lock.take()
        with pytest.raises(UserError, match="another run is at work"):
            fresh_folder(tmp_path / "demo")
    fresh_folder(tmp_path / "demo")
    assert [entry.name for entry in (tmp_path / "demo").iterdir()] == ["demo.json"]


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    from rlhf_trainer import lock

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        assert DirectoryLock(tmp_path).take()


# signals


def test_a_signal_in_a_rollout_leaves_it_and_the_resumed_run_is_the_same(whole, out, monkeypatch):
    from rlhf_trainer import metrics

    completed, calls = metrics.MetricsLog.completed, []

    def then_terminate(self, done, total):
        completed(self, done, total)
        calls.append(done)
        if len(calls) == 9:  # six completions a rollout: in the middle of the second
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "completed", then_terminate)
        with pytest.raises(Terminated, match=r"checkpoint-1 is saved in .*--resume goes on") as raised:
            train(settings(whole, save_steps=0))
    assert raised.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint.steps(out) == [1]
    train(settings(whole, resume=True))
    same_as_whole(whole, out)


@pytest.mark.parametrize("algorithm", ["hydra-ppo", "sft"])
def test_a_signal_in_an_update_finishes_the_step_first(tmp_path, monkeypatch, algorithm):
    from rlhf_trainer.optim import Optimizer

    step, calls = Optimizer.step, []

    def then_interrupt(self, *args):
        calls.append(self)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    train(settings(tmp_path, "whole", algorithm, num_ppo_epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", then_interrupt)
        with pytest.raises(Interrupted, match="SIGINT: checkpoint-2 is saved"):
            train(settings(tmp_path, "out", algorithm, num_ppo_epochs=1, save_steps=0))
    assert checkpoint.steps(tmp_path / "out") == [2]
    train(settings(tmp_path, "out", algorithm, num_ppo_epochs=1, resume=True))
    same_as_whole(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_before_the_first_step_still_leaves_a_run_to_go_on_with(whole, out, monkeypatch, capsys, number, code):
    from rlhf_trainer import core

    def interrupted(*_):
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(core, "_evaluate_untrained", interrupted)
        settings(whole).to_yaml(whole / "run.yaml")
        assert main(["--config", str(whole / "run.yaml")]) == code
    assert f"{signal.Signals(number).name}: checkpoint-0 is saved" in error_line(capsys)
    assert main(["--output", str(out), "--resume"]) == 0
    same_as_whole(whole, out)


def test_signals_that_were_ignored_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked is None
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked == signal.SIGTERM
            signal.raise_signal(signal.SIGTERM)  # at once after the first: the same wish, passed on by a launcher
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once_with_its_code(monkeypatch, number):
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    child = os.fork()
    if child == 0:
        with Stop():
            for _ in range(2):
                signal.raise_signal(number)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
import pathlib, tiny
from rlhf_trainer import cli, core, signals
from rlhf_trainer.optim import Optimizer

def slow(step):
    def stepping(self, *args):
        print("updating", flush=True)
        time.sleep(0.1 if sys.argv[3] == "once" else 60)
        return step(self, *args)
    return stepping

signals.ECHO_S = 0.0
Optimizer.step = slow(Optimizer.step)
directory = pathlib.Path(sys.argv[2])
tiny.config(directory, output_dir=str(directory / "out"), total_steps=500, save_steps=0).to_yaml(directory / "run.yaml")
sys.exit(cli.main(["--config", str(directory / "run.yaml")]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("times", ["once", "twice"])
@pytest.mark.slow
def test_the_command_saves_and_leaves_with_the_signals_code_and_at_once_when_told_twice(
    whole, tmp_path, number, code, times
):
    command = [sys.executable, "-c", SLOW, os.path.dirname(__file__), str(tmp_path), times]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        while "updating" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        if times == "twice":
            while "once more leaves at once" not in process.stderr.readline():
                assert process.poll() is None
            asked = time.monotonic()
            process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    saved = checkpoint.steps(tmp_path / "out")
    if times == "twice":
        assert time.monotonic() - asked < 20  # of the 60 that the step would take
        assert saved == []
    else:
        name = signal.Signals(number).name
        assert error.splitlines()[-1].startswith(f"rlhf-train: {name}: checkpoint-{saved[-1]} is saved in ")


def test_no_thread_but_the_main_one_gets_handlers():
    import threading

    found = []
    thread = threading.Thread(target=lambda: found.append(Stop().__enter__()._before))
    thread.start()
    thread.join()
    assert found == [{}]
