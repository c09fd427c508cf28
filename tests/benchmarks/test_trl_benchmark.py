"""`python -m benchmarks trl`: TRL's trainers and the same ones patched, in processes of their own."""

from dataclasses import replace

import pytest

from benchmarks import trl
from benchmarks.case import OURS
from benchmarks.runner import time_case


def test_every_trainer_has_its_case_whose_base_is_trl_as_it_is():
    kinds = {work.kind for work in trl.WORKS}
    assert kinds == {"sft", "dpo", "grpo", "rloo"}
    assert len({case.name for case in trl.cases()}) == len(trl.WORKS)
    assert {case.base for case in trl.cases()} == {trl.THEIRS}
    assert all(work.task.vocabulary >= 32768 for work in trl.WORKS)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(trl.cases()), ids=lambda case: case.name.split(":")[0])
def test_both_take_the_same_steps(case):
    pytest.importorskip("trl")
    tiny = replace(case, build=lambda _, build=case.build: build(True))
    ours, theirs = time_case(tiny, 1)
    assert (ours.contestant, theirs.contestant) == (OURS, trl.THEIRS)
    assert ours.unavailable == theirs.unavailable == ""
    numbers = [[float(x) for x in timing.figures["loss"].split(" to ")] for timing in (ours, theirs)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4 if "float32" in case.name else 0.05)
