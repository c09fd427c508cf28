"""The command line: flags over YAML, one line and exit code 2 for bad input, nothing touched before it is checked."""

import pytest

import rlhf_trainer
from rlhf_trainer import cli
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.errors import UserError


def config_of(*words: str) -> TrainConfig:
    return cli.load_config(list(words))


@pytest.mark.parametrize("flag", ["--kl-coef=0.5", "--kl_coef=0.5"], ids=["dashes", "underscores"])
def test_dashes_and_underscores_are_the_same(flag):
    assert config_of("ppo", flag).kl_coef == 0.5


def test_flags_override_the_file_and_the_first_word_overrides_both(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("algorithm: sft\nseed: 3\nlearning_rate: 1e-4\n")
    config = config_of("remax", "--config", str(path), "--seed", "7")
    assert (config.algorithm, config.seed, config.learning_rate) == ("remax", 7, 1e-4)
    assert config_of("--config", str(path)).algorithm == "sft"


def test_lists_switches_and_null_read_as_people_type_them():
    config = config_of(
        "ppo", "--reward", "a:b", "c:d", "--reward-weights", "1", "-0.5", "--resume", "--no-report",
        "--whiten-advantages", "false", "--max-active", "null", "--output", "here", "--kv-memory", "2GiB",
    )  # fmt: skip
    assert config.reward == ["a:b", "c:d"]
    assert config.reward_weights == [1.0, -0.5]
    assert (config.resume, config.report, config.whiten_advantages) == (True, False, False)
    assert (config.max_active, config.output_dir, config.kv_memory) == (None, "here", "2GiB")


def test_resume_takes_the_options_the_run_was_started_with(tmp_path):
    TrainConfig(algorithm="remax", seed=11, total_steps=4).to_yaml(tmp_path / "config.yaml")
    config = config_of("remax", "--output", str(tmp_path), "--resume", "--total-steps", "9")
    assert (config.seed, config.total_steps, config.resume) == (11, 9, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hydra-pp", "unknown algorithm 'hydra-pp'; did you mean hydra-ppo?"),
        ("ppo --kl-coeff 1", "unknown option --kl-coeff; did you mean --kl-coef?"),
        ("ppo --kl-coef", "--kl-coef: expected a number or null, got nothing"),
        ("ppo --kl-coef x", "--kl-coef: expected a number or null, got 'x'"),
        ("ppo --seed 1.5", "--seed: expected a whole number, got '1.5'"),
        ("ppo stray", "unexpected argument 'stray'"),
        ("ppo --gamma 2", "gamma: must be at most 1"),
        ("ppo --config nowhere.yaml", "config: cannot read 'nowhere.yaml'"),
        ("ppo --config", "--config: expected a file name"),
        ("ppo --model /no/model --prompts x", "model: '/no/model' does not exist"),
        ("--seed 1", "which algorithm?"),
        ("plan --batch 0", "batch: must be at least 1"),
        ("plan --model /no/model", "config_or_path: '/no/model' does not exist"),
    ],
    ids=lambda v: "",
)
def test_bad_input_is_one_line_and_exit_code_2(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_an_error_in_the_configuration_file_names_the_key(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rat: 1\n")
    assert cli.main(["ppo", "--config", str(path)]) == 2
    assert "unknown key 'learning_rat'; did you mean 'learning_rate'?" in capsys.readouterr().err


def test_training_receives_the_checked_configuration(monkeypatch, capsys):
    seen = []

    class Result:
        step, output_dir = 3, "there"

    monkeypatch.setattr(rlhf_trainer, "train", lambda config: seen.append(config) or Result, raising=False)
    assert cli.main(["remax", "--seed", "5", "--output", "there"]) == 0
    assert seen[0] == TrainConfig(algorithm="remax", seed=5, output_dir="there")
    assert "remax: 3 steps, results in there" in capsys.readouterr().out


def test_debug_shows_the_traceback_before_the_line(monkeypatch, capsys):
    def fail(config):
        raise UserError("something is off")

    monkeypatch.setattr(rlhf_trainer, "train", fail, raising=False)
    assert cli.main(["ppo", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("rlhf-train: error: something is off\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise ValueError("raised by a test, so not by this project")

    monkeypatch.setattr(rlhf_trainer, "train", fail, raising=False)
    with pytest.raises(ValueError, match="not by this project"):
        cli.main(["ppo"])


def test_plan_prints_one_layout_or_all_of_them(tmp_path, capsys):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert cli.main(["plan", "--model", str(tmp_path), "--algorithm", "ppo", "--budget", "1GiB"]) == 0
    assert "critic model" in (shown := capsys.readouterr().out)
    assert "largest batch" in shown
    assert cli.main(["plan", "--model", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("lora-ppo", "j-hydra-ppo", "remax"))
