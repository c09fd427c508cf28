"""A run that was interrupted and resumed is the run that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from safetensors.torch import load_file

from rlhf_trainer import checkpoint, train
from rlhf_trainer.algorithms import TABLE
from rlhf_trainer.errors import UserError

TIMED = ("timing/", "memory/", "sampling/tokens_per_second")


def curve(path):
    """Everything measured but times and bytes, by step."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def settings(tmp_path, name, algorithm, **changes):
    extra = {"kl_controller": "adaptive"} if "ppo" in algorithm else {}
    extra |= {"lr_scheduler_type": "linear", "warmup_steps": 2} if algorithm == "sft" else {}
    extra |= {"rounds": 6} if algorithm == "inpo" else {}  # of three steps or of six, each step is a round
    extra |= {"lora_r": 0, "precompute_ref_logprobs": True} if algorithm == "r-dpo" else {}
    return tiny.config(tmp_path, algorithm, output_dir=str(tmp_path / name), **(extra | changes))


@pytest.mark.parametrize("algorithm", TABLE)
def test_three_steps_and_three_more_are_six(tmp_path, algorithm):
    train(settings(tmp_path, "whole", algorithm, total_steps=6))
    train(settings(tmp_path, "split", algorithm, total_steps=3))
    result = train(settings(tmp_path, "split", algorithm, total_steps=6, resume=True))
    assert result.step == 6
    assert len(result.history) == 3
    assert curve(tmp_path / "split") == curve(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, split = (load_file(tmp_path / run / "checkpoint-6" / name) for run in ("whole", "split"))
        assert whole.keys() == split.keys()
        assert all((whole[key] == split[key]).all() for key in whole)


def test_resuming_without_a_checkpoint_starts_from_the_beginning(tmp_path):
    assert len(train(settings(tmp_path, "out", "sft", resume=True)).history) == 2


def test_resuming_a_finished_run_does_nothing_more(tmp_path):
    train(settings(tmp_path, "out", "sft"))
    before = curve(tmp_path / "out")
    assert train(settings(tmp_path, "out", "sft", resume=True)).history == []
    assert curve(tmp_path / "out") == before


def test_resuming_as_another_run_is_refused(tmp_path):
    train(settings(tmp_path, "out", "hydra-ppo"))
    with pytest.raises(UserError, match=r"resume: learning_rate was 0\.001 in the checkpoint and is 0\.01 now"):
        train(settings(tmp_path, "out", "hydra-ppo", resume=True, learning_rate=1e-2))


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import pathlib, tiny
from rlhf_trainer import train
directory = pathlib.Path(sys.argv[2])
train(tiny.config(directory, output_dir=str(directory / sys.argv[3]), total_steps=8, save_steps=1, resume=True))
"""


def test_a_run_killed_with_signal_nine_goes_on_as_if_it_had_not_been(tmp_path):
    here = os.path.dirname(__file__)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny.config(tmp_path, output_dir=str(whole), total_steps=8, save_steps=1))
    command = [sys.executable, "-c", RUN, here, str(tmp_path), "killed"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while not any(step >= 2 for step in checkpoint.steps(killed)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert checkpoint.steps(killed)[-1] < 8
    result = train(tiny.config(tmp_path, output_dir=str(killed), total_steps=8, save_steps=1, resume=True))
    assert len(result.history) < 8
    assert curve(killed) == curve(whole)
