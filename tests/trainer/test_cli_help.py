"""Help that teaches: quick, every option where it means something, examples that parse, a template that loads."""

import re
import resource
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

from rlhf_trainer import cli
from rlhf_trainer.algorithms import TABLE, with_defaults
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.defaults import CRITIC, DEFAULTS, PENALISED, READ_BY, applies
from rlhf_trainer.flags import COMMANDS, load_config
from rlhf_trainer.help import EXIT_CODES, REAL_RUN, examples
from rlhf_trainer.names import ALGORITHMS
from rlhf_trainer.template import template

OPTIONS = [item.name for item in fields(TrainConfig)]


def shown(capsys, *words: str) -> str:
    assert cli.main(list(words)) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize("words", ["--help", "hydra-ppo --help", "--version", "config remax", "report --help"])
def test_what_only_informs_imports_no_torch_and_is_quick(words):
    code = (
        f"import sys; from rlhf_trainer.cli import main; main({words.split()!r}); "
        "assert not {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0  # seconds; 0.1 on a quiet machine


def test_the_overview_names_every_algorithm_command_and_exit_code(capsys):
    text = shown(capsys, "--help")
    assert text == shown(capsys) == shown(capsys, "help")
    for name in (*ALGORITHMS, *COMMANDS, *map(str, EXIT_CODES)):
        assert re.search(rf"^  {re.escape(name)} ", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithms_help_lists_what_it_reads_with_its_own_defaults(algorithm, capsys):
    text = shown(capsys, algorithm, "--help")
    assert text == shown(capsys, "help", algorithm)
    for name in set(OPTIONS) - {"algorithm"}:
        listed = re.search(rf"^  --{name.replace('_', '-')}\b", text, re.MULTILINE) is not None
        assert listed == applies(name, algorithm), name
    rate = DEFAULTS[algorithm]["learning_rate"]
    assert re.search(rf"--learning-rate X +peak learning rate \[{rate:g}\]", text)
    assert max(map(len, text.splitlines())) <= 100


def test_every_option_is_in_the_help_of_some_algorithm():
    assert all(any(applies(option, name) for name in ALGORITHMS) for option in OPTIONS)
    assert set(READ_BY) <= set(OPTIONS)


def test_which_options_are_read_agrees_with_the_table_of_algorithms():
    assert [name for name, row in TABLE.items() if "critic" in row.trained] == list(CRITIC)
    assert [name for name, row in TABLE.items() if row.data is None and row.penalised] == list(PENALISED)
    assert [name for name, row in TABLE.items() if row.data is None] == [
        n for n in ALGORITHMS if applies("ptx_coef", n)
    ]
    assert {name: dict(row.defaults) for name, row in TABLE.items()} == DEFAULTS


def test_a_flag_without_effect_is_a_warning(capsys, monkeypatch):
    monkeypatch.setattr("rlhf_trainer.train", lambda config: (_ for _ in ()).throw(KeyboardInterrupt), raising=False)
    assert cli.main(["remax", "--lam", "0.9", "--kl-mode", "one-step"]) == cli.INTERRUPTED
    error = capsys.readouterr().err
    assert "warning: --lam has no effect on remax\n" in error
    assert "kl-mode" not in error


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_examples_are_commands_that_parse(algorithm, tmp_path, monkeypatch, recwarn, capsys):
    monkeypatch.chdir(tmp_path)
    assert algorithm in REAL_RUN
    for _, commands in examples(algorithm):
        for command in commands:
            program, *words = shlex.split(command)
            assert program == "rlhf-train"
            if ">" in words:
                (tmp_path / words[-1]).write_text(shown(capsys, *words[:-2]))
            else:
                assert load_config(words).algorithm == algorithm
    assert not recwarn.list  # none of them gives an option that has no effect


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_template_changes_nothing_as_it_stands_or_with_every_line_made_live(algorithm, tmp_path):
    plain = TrainConfig(algorithm=algorithm, model="demo")
    text = template(plain)
    for content in (text, re.sub(r"^# (\w+: )", r"\1", text, flags=re.MULTILINE)):
        path = tmp_path / "run.yaml"
        path.write_text(content)
        assert with_defaults(TrainConfig.from_yaml(path)) == with_defaults(plain)
    assert {m[1] for m in re.finditer(r"^(?:# )?(\w+): ", text, re.MULTILINE)} >= {
        name for name in OPTIONS if applies(name, algorithm)
    }


def test_the_template_holds_what_was_given_and_overrides_it_once_written(tmp_path, capsys):
    words = ["--model", "m", "--prompts", "p.jsonl", "--reward", "a:b", "c:d", "--lr-scheduler-type", "cosine"]
    (tmp_path / "run.yaml").write_text(shown(capsys, "config", "rloo", *words, "--reward-weights", "1", "0.5"))
    config = load_config(["--config", str(tmp_path / "run.yaml"), "--seed", "4"])
    assert (config.algorithm, config.model, config.prompts, config.seed) == ("rloo", "m", "p.jsonl", 4)
    assert (config.reward, config.reward_weights, config.lr_scheduler_type) == (["a:b", "c:d"], [1.0, 0.5], "cosine")


def test_later_files_override_earlier_ones_and_flags_override_both(tmp_path):
    for name, text in {"a": "algorithm: ppo\nseed: 1\ngamma: 0.9\nlam: 0.8\n", "b": "seed: 2\ngamma: 0.5\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")]
    config = load_config([*files, "--gamma", "0.7"])
    assert (config.seed, config.gamma, config.lam) == (2, 0.7, 0.8)


def test_the_version_names_what_is_installed(capsys):
    line = shown(capsys, "--version")
    assert re.fullmatch(r"rlhf-train \d+\.\d+\.\d+\S* \(Python 3\S*, torch \d\S*, .*transformers \d\S*\)\n", line)


def test_an_extra_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert cli.main(["config", "ppo"]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "yaml is not installed; pip install 'rlhf-kernels[trainer]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("confg ppo", "unknown algorithm 'confg'; did you mean config?"),
        ("ppo --confg x", "unknown option --confg; did you mean --config?"),
        ("report", "report: which run?"),
        ("report nowhere", "report: 'nowhere/metrics.jsonl' holds no metrics yet"),
        ("report --open x", "unknown option --open; report takes folders of runs and --output"),
        ("completion", "completion: expected one of bash, zsh, fish, got nothing"),
        ("completion csh", "completion: expected one of bash, zsh, fish, got 'csh'"),
        ("config", "which algorithm?"),
        ("config ppo --gamma 2", "gamma: must be at most 1"),
        ("plan --algorithm hydra", "--algorithm: 'hydra' is not one of sft, reward"),
        ("plan --config nowhere.yaml", "config: cannot read 'nowhere.yaml'"),
    ],
    ids=lambda v: "",
)
def test_words_that_cannot_be_are_one_line_and_exit_code_2(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_configuration_file_is_the_plan_of_its_options(tmp_path, monkeypatch):
    asked: list[dict] = []

    class Planned:
        def __init__(self, path: str, algorithm: str, **keywords: object) -> None:
            asked.append({"algorithm": algorithm, **keywords})

        def table(self) -> str:
            return ""

    monkeypatch.setattr("rlhf_kernels.memory.plan", Planned)
    path = tmp_path / "run.yaml"
    path.write_text(
        "algorithm: hydra-ppo\nlora_r: 8\nper_device_train_batch_size: 4\nmax_prompt_length: 32\n"
        "max_completion_length: 16\ndtype: float32\nkv_memory: 1MiB\nreward: a:b\n"
    )
    options = (
        "--algorithm hydra-ppo --lora-rank 8 --batch 4 --prompt 32 --response 16 --dtype float32 --kv-memory 1MiB "
        "--no-reward-model"
    )
    for words in (["--config", str(path)], options.split(), ["--config", str(path), "--batch", "2"]):
        assert cli.main(["plan", *words]) == 0
    assert asked[0] == asked[1]
    assert asked[2] == asked[0] | {"batch": 2}
