"""The command line under the launchers people have: `accelerate launch` with our configurations, and `torchrun`."""

import importlib.resources
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_trainer import checkpoint, train
from rlhf_trainer.metrics import read_lines

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "trainer")]
import tiny  # noqa: E402
from test_processes import assert_same_runs  # noqa: E402

CONFIGS = importlib.resources.files("rlhf_trainer") / "configs"
ACCELERATE = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_2.yaml"), "-m", "rlhf_trainer"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf_trainer"]
TIMEOUT_S = 240


def launch(launcher, config, *flags):
    """`rlhf-train` with `config` as its YAML file, by a launcher."""
    file = Path(config.output_dir).with_suffix(".yaml")
    config.to_yaml(file)
    paths = [str(HERE), str(HERE.parent.parent / "python"), str(HERE.parent.parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, config.algorithm, "--config", str(file), *flags]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=file.parent
    )


def settings(folder, name, algorithm="hydra-ppo", **changes):
    return tiny.config(folder, algorithm, output_dir=str(folder / name), **changes)


@pytest.mark.slow
def test_a_failing_reward_ends_a_launched_run_with_one_line_and_a_checkpoint(tmp_path):
    done = launch(ACCELERATE, settings(tmp_path, "out", reward=["worker:fails"]))
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("rlhf-train:")]
    assert len(ours) == 1, done.stderr[-3000:]
    assert "reward 'worker:fails' raised RuntimeError('no luck here') on prompt" in ours[0]
    assert checkpoint.steps(tmp_path / "out") == [0]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_which_can_be_resumed(tmp_path):
    config = settings(tmp_path, "out", reward=["worker:dies"], save_steps=1)
    assert launch(TORCHRUN, config).returncode != 0
    assert checkpoint.steps(tmp_path / "out") == [1]
    train(settings(tmp_path, "out", reward=["worker:dies"], save_steps=1, resume=True))
    assert [row["step"] for row in read_lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_a_launched_run_says_what_a_run_says_and_trains_as_it(tmp_path, launcher):
    done = launch(launcher, settings(tmp_path, "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line[:9] for line in lines if line.startswith("step ")] == ["step 1/2 ", "step 2/2 "]
    assert lines[-1] == f"hydra-ppo: 2 steps, results in {tmp_path / 'two'}"
    train(settings(tmp_path, "one"))
    assert_same_runs(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["hydra-ppo", "sft"])
def test_a_run_of_two_processes_is_resumed_by_one_and_the_other_way_round(tmp_path, algorithm):
    whole, first, second = (settings(tmp_path, name, algorithm) for name in ("whole", "first", "second"))
    for config in (whole, first, second):
        config.gradient_accumulation_steps, config.kl_controller = 2, "adaptive" if algorithm != "sft" else "fixed"
    train(with_steps(whole, 4))
    train(first)
    assert launch(TORCHRUN, second).returncode == 0
    done = launch(TORCHRUN, with_steps(first, 4), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    train(with_steps(second, 4, resume=True))
    for name in ("first", "second"):
        assert [row["step"] for row in read_lines(tmp_path / name / "metrics.jsonl")] == [1, 2, 3, 4]
        assert_same_runs(tmp_path / name, tmp_path / "whole")


def with_steps(config, steps, **changes):
    from dataclasses import replace

    return replace(config, total_steps=steps, **changes)


@pytest.mark.parametrize("name", ["cpu_2", "ddp", "fsdp2"])
def test_every_configuration_is_one_that_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    read = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert read.num_processes == values["num_processes"]
    assert read.distributed_type == values["distributed_type"]
    assert read.main_process_port == 0  # any that is free
