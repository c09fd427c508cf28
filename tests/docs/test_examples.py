"""The examples run as they are, in seconds, and show what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "python" / "examples"


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as for a script


def example(name):
    """The example as a module, which its own command line would make of it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_loop_learns_its_texts():
    losses = example("head_in_your_loop").main(["--steps", "4"])
    assert losses[-1] < losses[0] - 0.3


def test_adapters_learn_from_their_own_rows_and_the_base_stays():
    found = example("lora_roles").main([])
    assert found["actor"] > 0
    assert found["critic"] > 0
    assert found["actor moved"] > 0
    assert found["critic moved"] > 0
    assert found["reference moved"] == found["reward moved"] == 0


def test_rollouts_do_not_depend_on_the_budget(capsys):
    whole, tight = example("budget_generation").main(["--kv-memory", "32MiB", "512KiB"])
    assert len(whole) == 36
    assert tight == whole
    preempted = [int(n) for n in re.findall(r"(\d+) preemptions", capsys.readouterr().out)]
    assert preempted[0] == 0
    assert preempted[1] > 0


def test_a_run_on_ones_own_data_is_rewarded_more_at_its_end(tmp_path):
    scores = example("train_on_your_data").main(["--steps", "3", "--output", "mine"])
    assert len(scores) == 3
    assert scores[-1] > scores[0]
    assert (tmp_path / "mine/run/actor/adapter_model.safetensors").is_file()


def script(name: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_example_runs_as_a_script():
    assert "reference  logprob  moved by 0.00e+00" in script("lora_roles.py")


@pytest.mark.slow
def test_trl_s_grpo_runs_on_the_fused_head():
    pytest.importorskip("trl")
    assert "\nreward " in script("trl_grpo.py")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_named_in_a_page_and_run_by_a_test(file):
    text = file.read_text()
    assert text.startswith('"""')
    assert len(text.splitlines()) <= 100
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(file.name in page.read_text() for page in pages), "no page names it"
    assert any(file.stem in test.read_text() for test in (ROOT / "tests").rglob("test_*.py")), "no test runs it"
