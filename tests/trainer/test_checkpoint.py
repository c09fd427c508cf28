"""A checkpoint is whole or absent, whatever interrupts its writing."""

import json
import random

import numpy as np
import pytest
import torch

from rlhf_trainer import checkpoint
from rlhf_trainer.checkpoint import Checkpoint


def made(step):
    tensors = {"w": torch.full((3,), float(step))}
    return Checkpoint(step, tensors, {"exp_avg.w": torch.ones(3)}, {"phase": {"kl_coef": 0.1}})


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path, made(3), keep=2)
    found = checkpoint.load(tmp_path)
    assert found.step == 3
    assert torch.equal(found.model["w"], torch.full((3,), 3.0))
    assert torch.equal(found.optimizer["exp_avg.w"], torch.ones(3))
    assert found.state["phase"] == {"kl_coef": 0.1}


def test_the_newest_are_kept(tmp_path):
    for step in (2, 4, 10):
        checkpoint.save(tmp_path, made(step), keep=2)
    assert checkpoint.steps(tmp_path) == [4, 10]
    assert checkpoint.load(tmp_path).step == 10
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_random_generators_go_on_where_they_were(tmp_path):
    checkpoint.save(tmp_path, made(1), keep=1)
    expected = (torch.rand(3), random.random(), np.random.rand(3))
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    checkpoint.load(tmp_path)
    got = (torch.rand(3), random.random(), np.random.rand(3))
    assert torch.equal(got[0], expected[0])
    assert got[1] == expected[1]
    assert (got[2] == expected[2]).all()


@pytest.mark.parametrize("failing", ["model", "optimizer", "rng", "state"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch, failing):
    checkpoint.save(tmp_path, made(1), keep=2)
    write = checkpoint.save_file

    def full(tensors, path):
        if failing in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path)

    def full_text(value):
        if failing == "state" and "step" in value:
            raise OSError(28, "No space left on device")
        return json.JSONEncoder().encode(value)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(checkpoint.json, "dumps", full_text)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, made(2), keep=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.load(tmp_path).step == 1


def test_a_directory_left_half_written_by_a_kill_is_not_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, made(1), keep=2)
    partial = tmp_path / ".partial-checkpoint-2"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoint.load(tmp_path).step == 1
    assert not partial.exists()
    checkpoint.save(tmp_path, made(2), keep=2)
    assert checkpoint.load(tmp_path).step == 2


def test_without_checkpoints_there_is_nothing_to_load(tmp_path):
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "missing") is None
