"""`python -m benchmarks rl`: trainers in processes of their own, the same task for all."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import rl, rl_task
from benchmarks.case import OURS, Unavailable
from benchmarks.registry import BENCHMARKS
from benchmarks.rl_turns import Process
from benchmarks.runner import time_case

TINY = rl.PPO.tiny()


@pytest.fixture
def place(tmp_path, monkeypatch):
    TINY.write(tmp_path)
    monkeypatch.setenv(rl_task.DIRECTORY, str(tmp_path))
    rl_task.token_scores.cache_clear()
    yield tmp_path
    rl_task.token_scores.cache_clear()


def test_a_task_is_read_back_as_it_was_written(place):
    assert rl_task.read(place) == TINY
    assert [json.loads(line)["prompt"] for line in (place / "prompts.jsonl").open()] == TINY.texts()


def test_text_and_tokens_are_worth_the_same_and_a_random_completion_nothing(place):
    completions = torch.randint(TINY.vocabulary, (4000, TINY.new_tokens), generator=torch.Generator().manual_seed(1))
    by_token = torch.tensor([rl_task.worth(row.tolist()) for row in completions[:20]])
    texts = [" ".join(f"t{token}" for token in row.tolist()) for row in completions]
    by_text = torch.tensor(rl_task.reward([""] * len(texts), texts))
    torch.testing.assert_close(by_text[:20], by_token, rtol=0, atol=0)
    assert abs(float(by_text.mean())) < 0.1
    assert float(by_text.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("case", list(rl.cases("cpu")), ids=lambda case: case.name.split(":")[0])
def test_every_case_has_its_peer_and_both_targets(case):
    peers = [who for who in case.build(True) if who.startswith("TRL")]
    assert case.base in peers
    assert [(t.quantity, t.at_least, t.at_most) for t in case.targets] == [("time", 1.5, None), ("memory", None, 0.4)]


def test_our_trainer_takes_its_steps_and_a_missing_peer_says_so(monkeypatch):
    monkeypatch.setenv(rl.PYTHON, "/nowhere/python")
    case = next(iter(BENCHMARKS["rl"]("cpu")))
    tiny = replace(case, build=lambda _, build=case.build: build(True))
    mine, *peers = time_case(tiny, 1, who=(OURS, "TRL"))[:1] + time_case(tiny, 1, who=("TRL",))
    assert mine.rounds == 1
    assert mine.peak_bytes > 0
    assert " to " in mine.figures["reward"]
    assert {peer.unavailable for peer in peers} == {"not installed"}


def test_a_trainer_that_fails_says_how(place):
    with pytest.raises(RuntimeError, match="frobnicate"):
        Process(sys.executable, "benchmarks.rl_ours", place, {"algorithm": "frobnicate", "kv_memory": "1MiB"})
    group = rl.Group({}, place=SimpleNamespace(name=str(place), cleanup=lambda: None))
    with pytest.raises(Unavailable, match="not installed"):
        group.start("x", rl.Trainer("benchmarks.rl_ours", python="/nowhere/python"))
