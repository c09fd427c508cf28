"""The demo's command: what it refuses, and a whole small run."""

import json

import pytest

from rlhf_trainer.demo import run, settings
from rlhf_trainer.errors import UserError
from rlhf_trainer.names import ONLINE


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["--algorithm", "hydra"], "did you mean hydra-ppo", id="unknown algorithm"),
        pytest.param(["--algorithms", "ppo,remix"], "did you mean remax", id="unknown algorithm in a list"),
        pytest.param(["--steps", "0"], "--steps must be at least 1, got 0", id="no steps"),
        pytest.param(["--stepz", "3"], "unrecognized arguments: --stepz", id="unknown option"),
    ],
)
def test_wrong_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        run.parse(argv)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(UserError, match="holds something else"):
        run.fresh_folder(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_former_demo_is_cleared(tmp_path):
    run.fresh_folder(tmp_path / "demo")
    (tmp_path / "demo" / "old").write_text("")
    run.fresh_folder(tmp_path / "demo")
    assert not (tmp_path / "demo" / "old").exists()


@pytest.mark.parametrize("algorithm", settings.TUNED)
def test_the_tuned_settings_are_valid(algorithm, tmp_path):
    (tmp_path / "reward-adapter").mkdir()
    settings.policy(algorithm, tmp_path, tmp_path / "out").validate()
    settings.reward_adapter(tmp_path).validate()
    settings.hydra_sft(tmp_path / "base").validate()


def test_a_small_demo_leaves_results_figures_and_a_page(tmp_path, monkeypatch, capsys):
    small = {"rollout_batch_size": 8, "per_device_train_batch_size": 8}
    monkeypatch.setattr(settings, "COMMON", settings.COMMON | small)
    output = tmp_path / "demo"
    assert run.main(["--output", str(output), "--steps", "2", "--sft-steps", "2", "--no-memory"]) == 0
    record = json.loads((output / "demo.json").read_text())
    assert record["algorithm"] == "hydra-ppo"
    assert {"rise", "length_control", "distinct_ratio", "nll_rise"} <= record["result"].keys()
    assert (output / "hydra-ppo" / "report.html").stat().st_size > 10_000
    assert (output / "hydra-ppo" / "plots" / "gold.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "gold score" in printed
    assert "that fell most" in printed


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ONLINE)
def test_memory_is_measured_as_planned(algorithm, tmp_path):
    from rlhf_kernels.memory import plan
    from rlhf_trainer.demo import measure

    base = tmp_path / "base"
    run.train_base(base, seed=0, steps=2)
    if algorithm == "pe-rlhf":
        run.train_reward_adapter(base, seed=0, steps=2)
    got = measure.in_fresh_process(algorithm, base)
    rank = settings.ADAPTERS["lora_r"]
    copies = algorithm not in ("remax", "reinforce", "rloo")  # their reference and reward share one frozen copy
    planned = plan(str(base), algorithm, batch=got.batch, lora_rank=rank, dtype="float32", reward_model=copies)
    assert got.static_bytes == pytest.approx(planned.static, rel=0.02)
