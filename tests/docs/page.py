"""Runs the blocks of one page in order, in this process and in the current directory: `python page.py PAGE.md`.

First comes the page's set-up, setup_NAME.py: the tensors, checkpoints and files that the page takes for granted.
Python blocks share one namespace. A block whose first line is a comment naming a file (`# my_rewards.py`) is also
written under that name. `rlhf-train` lines without shell syntax call the command's own function here, for the seconds
that importing torch takes; with --console they run in a shell like everything else.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(1, os.getcwd())  # modules that a page writes

from blocks import Block, bare, blocks, commands, instead, set_up, to_run  # noqa: E402

SHELL = re.compile(r"[|&;<>$`*?~(){}\n]")


def run_page(page: Path, console: bool) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    setup = set_up(page)
    if setup.exists():
        exec(compile(setup.read_text(), str(setup), "exec"), namespace)
    for block in blocks(page.read_text()):
        name = re.match(r"# (\w+\.(?:py|yaml|sh))$", block.text.partition("\n")[0])
        if name:
            Path(name[1]).write_text(block.text)
        if block.language == "python":
            run_python(page, block, namespace)
        elif block.language == "bash":
            run_bash(page, block, console)
        elif block.language == "yaml":
            run_yaml(page, block)


def run_python(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    entry = instead(block.text.partition("\n")[0])
    say(page, block.line, "python" if entry is None else f"not run: {entry.why}")
    if entry is None:  # blank lines before it, so that a traceback names the page's own line
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def run_yaml(page: Path, block: Block) -> None:
    """A run's configuration: its keys and types are checked."""
    import yaml

    from rlhf_trainer import TrainConfig

    say(page, block.line, "yaml")
    TrainConfig.from_dict(yaml.safe_load(block.text))


def run_bash(page: Path, block: Block, console: bool) -> None:
    script: list[str] = []  # commands that one shell runs, so that they share its variables
    for line, written in commands(block):
        command = to_run(written)
        if command is None:
            say(page, line, f"not run: {written}")
            continue
        words = bare(command).replace("\\\n", " ")
        if console or not words.startswith("rlhf-train ") or SHELL.search(words):
            script += [f"AT='line {line}'", f"echo {shlex.quote(f'== {page.name}, line {line}: {command}')}", command]
        else:
            run_shell(page, script)
            script = []
            say(page, line, command)
            from rlhf_trainer.cli import main

            if status := main(shlex.split(words)[1:]):
                sys.exit(f"{page.name}, line {line}: exit code {status}")
    run_shell(page, script)


def run_shell(page: Path, script: list[str]) -> None:
    if not script:
        return
    trap = f"trap 'echo {page.name}, $AT: exit code $? >&2' ERR"
    text = "\n".join(["set -euo pipefail", trap, *script])
    if subprocess.run(["bash", "-c", text], env=environment()).returncode:
        sys.exit(1)


def environment() -> dict[str, str]:
    """A shell's: this Python and its scripts first, the modules beside this file and those of the page importable."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE), os.getcwd()]))
    return {**os.environ, "PATH": path, "PYTHONPATH": modules}


def say(page: Path, line: int, what: str) -> None:
    print(f"== {page.name}, line {line}: {what}", flush=True)


if __name__ == "__main__":
    run_page(Path(sys.argv[1]).resolve(), "--console" in sys.argv[2:])
