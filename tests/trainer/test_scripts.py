"""The reference scripts run top to bottom on a tiny model and stay short enough to read."""

import importlib.util
import math
from pathlib import Path

import pytest
import tiny

SCRIPTS = Path(__file__).parents[2] / "python" / "scripts"


def load(name):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("name", ["ppo", "hydra_ppo", "remax", "rloo"])
def test_a_script_trains_the_tiny_model(tmp_path, name):
    model = tiny.checkpoint(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join(tiny.WORDS[i : i + 3]) for i in range(8)))
    scores = load(name).main([model, str(prompts), "--steps", "3", "--batch", "8", "--max-new-tokens", "8"])
    assert len(scores) == 3
    assert scores[1] != scores[0]


def test_the_dpo_script_learns_pairs_from_even_odds(tmp_path):
    model = tiny.checkpoint(tmp_path / "model")
    pairs = tiny.preferences(tmp_path / "pairs.jsonl")
    losses = load("dpo").main([model, pairs, "--steps", "6", "--batch", "12", "--rank", "4"])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_a_script_has_at_most_eighty_lines_and_uses_the_public_api_alone(name):
    text = (SCRIPTS / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    assert "rlhf_trainer" not in text
    allowed = ("rlhf_kernels import", "rlhf_kernels.nn import", "rlhf_kernels.generation import")
    assert all(any(form in line for form in allowed) for line in text.splitlines() if "from rlhf_kernels" in line)
