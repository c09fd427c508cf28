"""Two runs' metrics agree within float error: what every way of sharing a run is held to."""

from pathlib import Path

import pytest

from rlhf_trainer.metrics import read_lines

# of the machine, not of the run; and the sign of a margin that is 0 but for rounding where a round of inpo begins
LEFT_OUT = ("timing/", "memory/", "sampling/tokens_per_second", "rewards/accuracies")


def assert_same_metrics(folder: Path, other: Path) -> None:
    mine, theirs = (list(read_lines(place / "metrics.jsonl")) for place in (folder, other))
    assert [row.keys() for row in mine] == [row.keys() for row in theirs]
    for row, expected in zip(mine, theirs):
        for name, value in expected.items():
            if not name.startswith(LEFT_OUT):
                assert row[name] == pytest.approx(value, abs=2e-5, rel=2e-5), name
