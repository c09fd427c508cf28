"""The memory benchmark: a run's bytes are those of live tensors, its peak is near the plan, misses are said."""

import json
import shutil
import sys

import pytest

from benchmarks import memory_plan
from benchmarks.memory_plan_run import Work


def record(planned: int, measured: int) -> dict:
    work = {"algorithm": "ppo", "size": "1M", "dtype": "float32", "checkpointing": False}
    shape = {"batch": 4, "prompt": 64, "response": 64, "lora_rank": 16}
    return {
        "work": work | shape,
        "date": "today",
        "commit": "abc",
        "static": 2**20,
        "peaks": {"rollout": 1, "update": measured},
        "planned": {"static": 2**20, "peaks": {"update": planned}, "parameters": 1},
    }


def test_a_run_that_is_not_within_bounds_is_called_missed():
    runs = [record(100 * 2**20, 98 * 2**20), record(80 * 2**20, 100 * 2**20)]
    result = {"machine": {"cpu": "a chip"}, "versions": {"torch": "2"}, "runs": runs}
    text = memory_plan.markdown(result)
    assert "Peaks of 1 of 2 runs are within 10% of the plan (the farthest 20.0% off)" in text
    assert "-20.0% (missed)" in text
    assert "+2.0% |" in text


def test_every_algorithm_is_measured_at_three_sizes_in_both_dtypes():
    from rlhf_trainer.algorithms import TABLE

    found = {(w.algorithm, w.size, w.dtype) for w in memory_plan.works() if not w.checkpointing}
    assert len(found) == len(TABLE) * 3 * 2
    assert any(w.checkpointing for w in memory_plan.works())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs LD_PRELOAD and cc")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("algorithm", ["dpo", "hydra-ppo"])
def test_the_plan_is_within_bounds_of_a_real_run(algorithm, checkpointing):
    work = Work(algorithm, "1M", "float32", checkpointing)
    (found,) = memory_plan.measure([work], {})
    assert "error" not in found, json.dumps(found)
    assert found["static"] == found["planned"]["static"]
    planned, measured, _ = memory_plan.peaks(found)
    assert planned == pytest.approx(measured, rel=memory_plan.BOUND)
