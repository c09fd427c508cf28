"""Completion in real shells: commands, the options each reads, choices, files. A shell that is not here is left out."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from rlhf_trainer.completion import SHELLS, script
from rlhf_trainer.names import ALGORITHMS

pytest.importorskip("shtab")

BASH = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_rlhf_train 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = "source {script}; complete -C '{line}'"


def completed(shell: str, folder: Path, line: str) -> list[str]:
    """What `shell` offers where `line` ends."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = folder / f"script.{shell}"
    path.write_text(script(shell))
    words = " ".join(repr(word) for word in line.split(" "))
    text = (BASH if shell == "bash" else FISH).format(script=path, words=words, line=line)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run([shell, "-c", text], capture_output=True, text=True, cwd=folder, env=environment, check=True)
    return [row.split("\t")[0] for row in done.stdout.splitlines()]


@pytest.mark.parametrize("shell", ["bash", "fish"])
@pytest.mark.parametrize(
    ("line", "offered", "hidden"),
    [
        ("rlhf-train h", {"hydra-sft", "hydra-ppo"}, {"ppo"}),
        ("rlhf-train rep", {"report"}, {"plan"}),
        ("rlhf-train remax --k", {"--kl-coef", "--kl-mode", "--kv-memory"}, {"--lam", "--beta"}),
        ("rlhf-train dpo --l", {"--label-smoothing", "--lora-r"}, {"--lam"}),
        ("rlhf-train ppo --kl-estimator j", {"jensen_shannon"}, {"full_kl"}),
        ("rlhf-train ppo --whiten-r", {"--whiten-rewards"}, set()),
        ("rlhf-train config supe", {"superhf"}, {"ppo"}),
        ("rlhf-train completion z", {"zsh"}, {"bash"}),
        ("rlhf-train sft --config r", {"run.yaml"}, {"runs/"}),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
def test_a_shell_offers_what_can_follow(shell, line, offered, hidden, tmp_path):
    (tmp_path / "run.yaml").touch()
    found = {row.strip() for row in completed(shell, tmp_path, line)}
    assert offered <= found
    assert not hidden & found


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_one_that_its_shell_reads(shell, tmp_path):
    text = script(shell)
    assert all(name in text for name in ALGORITHMS)
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    path = tmp_path / "script"
    path.write_text(text)
    subprocess.run([shell, "-n", str(path)], check=True, capture_output=True)
