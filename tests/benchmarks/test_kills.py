"""The kills benchmark: what it compares, and that a difference is seen and said."""

import json
import random
import signal

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import kills
from benchmarks.kills import Blow, differences, markdown


@pytest.fixture
def runs(tmp_path):
    """Two finished runs that differ in their times alone."""
    for name, seconds in (("whole", 1.0), ("struck", 2.0)):
        last = tmp_path / name / f"checkpoint-{kills.STEPS}"
        last.mkdir(parents=True)
        (last / "vocabulary.txt").write_bytes(b"weights")
        metadata = {"format": "pt", "fingerprint": "ab"}  # written in an order that differs from process to process
        save_file({"w": torch.ones(2)}, last / "model.safetensors", metadata=metadata)
        (last / "state.json").write_text(name)
        rows = [{"step": step, "reward": 0.5, "timing/update": seconds} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "whole", tmp_path / "struck"


def test_times_and_the_directorys_name_make_no_difference(runs):
    assert list(differences(*runs)) == []


@pytest.mark.parametrize("name", ["vocabulary.txt", "model.safetensors", "metrics.jsonl"])
def test_any_other_difference_is_named(runs, name):
    file = next(runs[1].rglob(name))
    if name == "model.safetensors":
        save_file({"w": torch.tensor([1.0, 1.0 + 2**-23])}, file)
    file.write_bytes(file.read_bytes().replace(b"weights", b"weighty").replace(b"0.5", b"0.25"))
    assert list(differences(*runs)) == [str(file.relative_to(runs[1]))]


def test_a_file_that_one_run_lacks_is_named(runs):
    (runs[0] / "adapter.json").write_text("{}")
    assert list(differences(*runs)) == ["adapter.json: only in one"]


def test_a_plan_aims_half_of_its_kills_and_ends_with_the_other_signals():
    plan = list(kills._plan(20, random.Random(0)))
    shots = [blow for blow in plan if blow.number == signal.SIGKILL]
    assert len(shots) == 20
    assert sum(blow.aim == "any moment" for blow in shots) == 10
    assert {"a write", "a deletion", "the result", "the resumed run"} < {blow.aim for blow in shots}
    assert {blow.algorithm for blow in shots} == set(kills.RUNS)
    assert [blow.number for blow in plan[20:22]] == [signal.SIGTERM, signal.SIGINT]


def test_the_table_counts_what_is_exact_and_says_what_is_not():
    blows = [
        Blow("sft", signal.SIGKILL, "a write", 3, [".partial-checkpoint-3"], -9, 2),
        Blow("sft", signal.SIGKILL, "any moment", 1, [], -9, None, ["metrics.jsonl"]),
    ]
    text = markdown(blows, 2, 0)
    assert "1 of 2 resumed runs are exactly the undisturbed one; 1 of the kills" in text
    assert "| `.partial-checkpoint-3` | killed | checkpoint-2 | the same |" in text
    assert "| nothing | killed | the beginning | metrics.jsonl |" in text
