"""The record of a run: one flushed line a step, cut and continued on resume, whatever a kill left behind."""

import io
import json

import pytest
import torch

from rlhf_trainer.config import TrainConfig
from rlhf_trainer.errors import UserError
from rlhf_trainer.metrics import MetricsLog, cut_after, make_progress, read_lines, shown_values


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_one_line_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run", TrainConfig())
    for step in (1, 2):
        log.log(step, {"reward": torch.tensor(0.5 * step), "objective/kl": 0.01})
        assert lines(tmp_path / "new" / "run" / "metrics.jsonl")[-1] == {
            "step": step, "reward": 0.5 * step, "objective/kl": 0.01,
        }  # fmt: skip
    log.samples(2, [{"prompt": "é", "completion": "x", "reward": 1.0}])
    assert lines(tmp_path / "new" / "run" / "samples.jsonl") == [
        {"step": 2, "prompt": "é", "completion": "x", "reward": 1.0}
    ]
    log.close()
    log.close()


def test_the_configuration_is_recorded_beside_the_metrics(tmp_path):
    config = TrainConfig(seed=4)
    MetricsLog(tmp_path, config).close()
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_what_is_not_finite_is_null(tmp_path):
    with MetricsLog(tmp_path, TrainConfig()) as log:
        log.log(1, {"reward": float("nan"), "reward_std": float("inf")})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": None, "reward_std": None}]


def test_resuming_cuts_the_lines_after_the_checkpoint_and_a_half_written_one(tmp_path):
    with MetricsLog(tmp_path, TrainConfig()) as log:
        for step in (1, 2, 3):
            log.log(step, {"reward": step})
            log.samples(step, [{"completion": str(step)}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed here
    with MetricsLog(tmp_path, TrainConfig(), resume_step=2) as log:
        log.log(3, {"reward": 30})
    assert [(r["step"], r["reward"]) for r in lines(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 30)]
    assert [r["step"] for r in lines(tmp_path / "samples.jsonl")] == [1, 2]


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, TrainConfig()) as log:
            log.log(1, {"reward": 1})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_only_a_last_line_may_be_broken(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m.jsonl, line 2: not JSON"):
        list(read_lines(path))
    assert list(read_lines(tmp_path / "missing.jsonl")) == []
    cut_after(tmp_path / "missing.jsonl", 3)
    assert not (tmp_path / "missing.jsonl").exists()


def test_other_processes_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "out", TrainConfig(), main_process=False) as log:
        log.log(1, {"reward": 1})
        log.samples(1, [{}])
    assert not (tmp_path / "out").exists()


def test_a_pipe_gets_one_plain_line_every_logging_steps(tmp_path, capsys):
    with MetricsLog(tmp_path, TrainConfig(total_steps=4, logging_steps=2)) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"reward": 0.25, "objective/kl": 0.0123, "completions/mean_length": 40.0})
    assert capsys.readouterr().out.splitlines() == [
        f"step {step}/4  reward +0.250  kl 0.0123  length 40.0" for step in (2, 4)
    ]


def test_a_terminal_gets_a_bar_with_the_same_figures():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    progress = make_progress("hydra-ppo", total=3, done=0, file=screen)
    progress.show(2, {"reward": 0.5}, due=False)
    progress.close()
    assert "hydra-ppo" in screen.getvalue()
    assert "+0.500" in screen.getvalue()


def test_supervised_runs_show_their_loss_and_policies_their_reward():
    assert shown_values({"loss": 2.0}) == {"loss": "2.0000"}
    assert shown_values({"loss": 2.0, "reward": 1.0, "timing/tokens_per_second": 1234.5}) == {
        "reward": "+1.000",
        "tok/s": "1,234",
    }


def test_trackers_receive_the_configuration_and_every_step(tmp_path, monkeypatch):
    from accelerate import tracking

    seen = []

    class Fake(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir):
            seen.append(("open", run_name, logging_dir))

        def store_init_configuration(self, values):
            seen.append(("config", values["seed"], values["reward"]))

        def log(self, values, step, **_):
            seen.append(("log", step, values["reward"]))

        def finish(self):
            seen.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    with MetricsLog(tmp_path / "run", TrainConfig(seed=9, report_to=["tensorboard"])) as log:
        log.log(1, {"reward": 0.5})
    assert seen == [("open", "run", str(tmp_path / "run")), ("config", 9, "[]"), ("log", 1, 0.5), ("finish",)]
