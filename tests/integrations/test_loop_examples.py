"""The examples of the integrations run as they stand; each checks itself."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "python" / "examples"
NAMES = (
    "verl_logprobs",
    "openrlhf_loop",
    "plain_loop",
    "hydra_sft_trainer",
    "transformers_attention",
    "peft_both_ways",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name, capsys):
    if name == "peft_both_ways":
        pytest.importorskip("peft")
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 50
    runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out
