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
from rlhf_trainer.errors import UserError
from rlhf_trainer.metrics import read_lines
from rlhf_trainer.processes import ALONE, Processes, join, summed

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "trainer")]
import tiny  # noqa: E402

# of the machine, not of the run; and the sign of a margin that is 0 but for rounding where a round of inpo begins
LEFT_OUT = ("timing/", "memory/", "sampling/tokens_per_second", "rewards/accuracies")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TIMEOUT_S = 240


def command(count, arguments):
    """Runs Python on `count` processes; whatever it says comes back."""
    paths = [str(HERE), str(HERE.parent.parent / "python"), str(HERE.parent.parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    start = [sys.executable] if count == 1 else [sys.executable, *TORCHRUN, str(count)]
    done = subprocess.run(
        [*start, *arguments], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    return done


def trained(count, configs, folder):
    """What each process ends each of the configurations with: [process][configuration]."""
    file = folder / f"jobs-{count}"
    file.write_text(json.dumps([asdict(config) for config in configs]))
    done = command(count, [str(HERE / "worker.py"), str(file)])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(count)]


def assert_same_runs(folder, other):
    """Metrics and weights agree within float error."""
    mine, theirs = (list(read_lines(place / "metrics.jsonl")) for place in (folder, other))
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for row, expected in zip(mine, theirs):
        for name, value in expected.items():
            if not name.startswith(LEFT_OUT):
                assert row[name] == pytest.approx(value, abs=2e-5, rel=2e-5), name
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
    failing = settings(folder, "failing", "remax", reward=["worker:fails"])
    after = settings(folder, "after", "sft")
    return folder, trained(2, [*configs(2), failing, after], folder)


@pytest.mark.parametrize("algorithm", CASES)
def test_two_processes_train_as_one(runs, algorithm):
    folder, _ = runs
    assert_same_runs(folder / f"{algorithm}-2", folder / f"{algorithm}-1")


def test_every_process_ends_with_the_same_bits(runs):
    _, (first, second) = runs
    assert [seen.get("weights") for seen in first] == [seen.get("weights") for seen in second]


def test_one_process_writes(runs):
    folder, _ = runs
    assert [row["step"] for row in read_lines(folder / "hydra-ppo-2" / "metrics.jsonl")] == [1, 2]
    shown = list(read_lines(folder / "hydra-ppo-2" / "samples.jsonl"))
    assert len(shown) == 2 * 6  # of all prompts, in the first step and the last


def test_a_reward_that_fails_on_one_process_stops_both_with_its_words_and_a_checkpoint(runs):
    folder, seen = runs
    errors = [process[len(CASES)]["error"] for process in seen]
    assert errors[0] == errors[1]
    assert "RewardError: reward 'worker:fails' raised RuntimeError('no luck here') on prompt" in errors[0]
    assert checkpoint.steps(folder / "failing") == [0]


def test_processes_go_on_together_after_a_run_that_failed(runs):
    folder, _ = runs
    assert checkpoint.steps(folder / "after") == [2]


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
