"""Training on several processes is training on one: the same curves and weights, one that writes, nobody who waits."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_trainer import checkpoint, train
from rlhf_trainer.algorithms import TABLE
from rlhf_trainer.errors import UserError
from rlhf_trainer.metrics import read_lines
from rlhf_trainer.processes import ALONE, Processes, join, summed

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "trainer")]
import tiny  # noqa: E402
from same_metrics import assert_same_metrics  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TIMEOUT_S = 540  # four processes on a busy machine of two cores


def command(count, arguments):
    """Runs Python on `count` processes; whatever it says comes back."""
    paths = [str(HERE), str(HERE.parent.parent / "python"), str(HERE.parent.parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *TORCHRUN, str(count), *arguments]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def trained(count, configs, folder):
    """What each process saw: [process][a probe, then each configuration's end, the last one's of a command line]."""
    file = folder / f"jobs-{count}"
    file.write_text(json.dumps([asdict(config) for config in configs]))
    done = command(count, [str(HERE / "worker.py"), str(file)])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(count)]


def assert_same_runs(folder, other):
    """Metrics and weights agree within float error."""
    assert_same_metrics(folder, other)
    step = checkpoint.steps(other)[-1]
    weights, expected = (load_file(p / f"checkpoint-{step}" / "model.safetensors") for p in (folder, other))
    assert weights.keys() == expected.keys()
    assert all((weights[name] - expected[name]).abs().max() < 2e-5 for name in expected)


def settings(folder, name, algorithm, **changes):
    return tiny.config(folder, algorithm, output_dir=str(folder / name), **changes)


CASES = {
    "hydra-ppo": {"num_ppo_epochs": 2, "num_mini_batches": 2, "per_device_train_batch_size": 1, "lam": 0.9},
    "remax": {"reward": ["worker:length"], "eval_steps": 1, "reward_batch_size": 2},
    "inpo": {"num_generations": 3, "lora_r": 4, "rounds": 2},
    "dpo": {"lora_r": 4, "precompute_ref_logprobs": True, "gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """CASES on one process and on two, and behind them a run whose reward fails on one of two."""
    folder = tmp_path_factory.mktemp("runs")
    one_prompt = tiny.prompts(folder / "one.jsonl", 1)

    def configs(count):
        for algorithm, changes in CASES.items():
            held_out = {"eval_prompts": one_prompt} if algorithm == "remax" else {}
            yield settings(folder, f"{algorithm}-{count}", algorithm, **changes, **held_out)

    for config in configs(1):
        train(config)
    failing, commanded = (settings(folder, n, "remax", reward=["worker:fails"]) for n in ("failing", "commanded"))
    after = settings(folder, "after", "sft")
    return folder, trained(2, [*configs(2), failing, after, commanded], folder)


@pytest.mark.parametrize("algorithm", CASES)
def test_two_processes_train_as_one(runs, algorithm):
    folder, _ = runs
    assert_same_runs(folder / f"{algorithm}-2", folder / f"{algorithm}-1")


def test_every_process_ends_with_the_same_bits(runs):
    _, (first, second) = runs
    weights = [[seen.get("weights") for seen in process[1:-1]] for process in (first, second)]
    assert weights[0] == weights[1]
    assert sum(digest is not None for digest in weights[0]) == len(CASES) + 1


def test_one_process_writes(runs):
    folder, _ = runs
    assert [row["step"] for row in read_lines(folder / "hydra-ppo-2" / "metrics.jsonl")] == [1, 2]
    shown = list(read_lines(folder / "hydra-ppo-2" / "samples.jsonl"))
    assert len(shown) == 2 * 6  # of all prompts, in the first step and the last


@pytest.mark.parametrize("place", ["failing", "commanded"])
def test_a_reward_that_fails_on_one_process_leaves_a_checkpoint(runs, place):
    assert checkpoint.steps(runs[0] / place) == [0]


def test_a_reward_that_fails_on_one_process_stops_both_with_its_words(runs):
    errors = [process[1 + len(CASES)]["error"] for process in runs[1]]
    assert errors[0] == errors[1]
    assert "RewardError: reward 'worker:fails' raised RuntimeError('no luck here') on prompt" in errors[0]


def test_a_command_line_that_fails_on_all_says_so_once(runs):
    first, second = (process[-1] for process in runs[1])
    assert (first["code"], second["code"], second["said"]) == (2, 2, "")
    assert len(first["said"].splitlines()) == 1
    assert first["said"].startswith("rlhf-train: error: reward 'worker:fails' raised RuntimeError('no luck here')")


def test_processes_go_on_together_after_a_run_that_failed(runs):
    assert checkpoint.steps(runs[0] / "after") == [2]


def test_gradients_add_up_and_one_that_nobody_has_stays_away(runs):
    for process in runs[1]:
        assert process[0]["gradients"] == [[3.0, 3.0], [0.0, 5.0], None]
        assert process[0]["copied"] == 0.0


def test_what_fails_on_one_process_fails_on_all(runs):
    first, second = (process[0] for process in runs[1])
    assert second["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert first["error"] == f"PeerError: process 1 failed: {second['error']}"
    assert first["each"] == second["each"] == [0, 1]  # and they go on


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["hydra-ppo", "dpo"])
def test_two_processes_resume_bit_for_bit(tmp_path, algorithm):
    changes = {"lora_r": 4, "gradient_accumulation_steps": 2}
    whole = settings(tmp_path, "whole", algorithm, total_steps=4, **changes)
    split = settings(tmp_path, "split", algorithm, total_steps=2, **changes)
    rest = settings(tmp_path, "split", algorithm, total_steps=4, resume=True, **changes)
    trained(2, [whole, split, rest], tmp_path)
    weights, expected = (load_file(tmp_path / n / "checkpoint-4" / "model.safetensors") for n in ("split", "whole"))
    assert all((weights[name] == expected[name]).all() for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_every_algorithm_trains_on_several_processes_as_on_one(tmp_path, count):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "rollout_batch_size": 4}
    names = [name for name in TABLE if name not in CASES]
    trained(count, [settings(tmp_path, f"{name}-{count}", name, **changes) for name in names], tmp_path)
    for name in names:
        train(settings(tmp_path, name, name, **changes))
        assert_same_runs(tmp_path / f"{name}-{count}", tmp_path / name)


def test_shares_are_neighbours_and_cover_everything():
    shares = [Processes(rank, 4).share(10) for rank in range(4)]
    assert shares == [slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)]
    assert [Processes(rank, 3).share(2) for rank in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 2)]


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(UserError, match="rollout_batch_size: 3 prompts cannot be shared by 4 processes"):
        Processes(0, 4).check("rollout_batch_size", 3, "prompts")


def test_several_processes_do_not_take_one_named_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device: 'cuda:1' is one device"):
        join("cuda:1")


def test_a_process_alone_raises_what_its_work_raises():
    with pytest.raises(KeyError, match="this"), ALONE.together():
        raise KeyError("this")
    assert ALONE.each(lambda: 7) == [7]
    assert summed([{"a": 1.0}, {"a": 2.0, "b": 3.0}]) == {"a": 3.0, "b": 3.0}
