"""The fenced blocks of a Markdown page, the commands of a bash block, and what runs in the place of some commands."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_trainer.names import ALGORITHMS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
RUN = ("python", "bash", "yaml")  # every other language is output or prose, and stays as it is

# the last flag of a name counts, so that these stand behind whatever a page says
SMALL = "--total-steps {steps} --rollout-batch-size 4 --max-completion-length 8 --no-report"
TRAINER = re.compile(rf"(?:rlhf-train|-m rlhf_trainer)[\s\\]+(?:--config\s|(?:{'|'.join(ALGORITHMS)})\b)")
END = re.compile(r"\s*;|\s+(?:#|\||&|\d?>)|\Z")  # of a simple command: a comment, a pipe, a redirection


@dataclass(frozen=True)
class Block:
    """`text` begins on line `line` (from 1) of its page, without the fence's own indentation."""

    language: str
    line: int
    text: str


@dataclass(frozen=True)
class Instead:
    """`run` (None: nothing) in the place of a whole command, or of a Python block's first line, that `line` matches."""

    line: str
    run: str | None
    why: str


TABLE = (
    Instead(r"make ([\w-]+).*", rf"make -n -C {ROOT} \1 > make.log", "takes minutes, makes .venv: make only plans it"),
    Instead(r"python -m benchmarks (.*)", r"python -m parse_benchmarks \1", "takes minutes: its flags are parsed"),
    Instead(
        r"rlhf-train plan (?!.*--algorithm)(.*--budget.*)", r"rlhf-train plan \1 --algorithm hydra-ppo",
        "seventeen searches for the largest batch take half a minute",
    ),
    Instead(
        r"(?:accelerate launch|torchrun) .*-m rlhf_trainer (.*) --fsdp(.*)", r"rlhf-train \1\2",
        "one process has no shards; as below",
    ),
    Instead(
        r"(?:accelerate launch|torchrun) .*-m rlhf_trainer (.*)", r"rlhf-train \1",
        "takes half a minute: tests/distributed launches several processes",
    ),
    Instead(r"source <\((.*)\)", r"\1 > sourced && source sourced", "a process substitution hides the exit code"),
    Instead(r"pip install .*", None, "tested is what is installed here; test_blocks_installed.py installs the wheel"),
)  # fmt: skip


def set_up(page: Path) -> Path:
    """Where a page's set-up is, if it has one: setup_memory.py for docs/memory.md."""
    name = page.stem if page.parent in (ROOT, ROOT / "docs") else f"{page.parent.name}_{page.stem}"
    return Path(__file__).resolve().parent / f"setup_{name.lower()}.py"


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page in order. ValueError for a fence that is not closed."""
    found: list[Block] = []
    opened: tuple[str, int, str, str] | None = None  # language, first line, indentation, fence
    body: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"( *)(`{3,})(\w*)", line)
        if opened is None and fence:
            opened, body = (fence[3], number + 1, fence[1], fence[2]), []
        elif opened is not None and line.strip() == opened[3]:
            found.append(Block(opened[0], opened[1], "".join(row + "\n" for row in body)))
            opened = None
        elif opened is not None:
            body.append(line.removeprefix(opened[2]))
    if opened is not None:
        raise ValueError(f"line {opened[1] - 1}: the fence is not closed")
    return found


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """(line of the page, command) of a bash block: whole commands as bash reads them; comments alone are none."""
    kept: list[str] = []
    for number, row in enumerate(block.text.splitlines(), block.line):
        if not kept and (not row.strip() or row.lstrip().startswith("#")):
            continue
        kept.append(row)
        if complete("\n".join(kept)):
            yield number - len(kept) + 1, "\n".join(kept)
            kept = []
    if kept:
        raise ValueError(f"line {block.line}: bash does not take {kept[0]!r} for a whole command")


def complete(command: str) -> bool:
    """Whether bash reads it as it stands; a here-document or a line that goes on is not at its end."""
    if command.endswith("\\"):
        return False
    read = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True)
    return read.returncode == 0 and not read.stderr


def instead(command: str) -> Instead | None:
    """The table's entry for a command (its comment apart) or for a Python block's first line."""
    return next((entry for entry in TABLE if re.fullmatch(entry.line, bare(command), re.DOTALL)), None)


def bare(command: str) -> str:
    """A command without the comment behind it."""
    return re.sub(r"\s+# .*$", "", command).strip()


def to_run(command: str) -> str | None:
    """What is run for a command: itself, a training run of a step or two, or what the table says; None: nothing."""
    entry = instead(command)
    if entry is not None and entry.run is None:
        return None
    if entry is not None and entry.run is not None:
        command = re.sub(entry.line, entry.run, bare(command))
    trainer = TRAINER.search(command)
    if trainer is None or re.search(r"--help\b", command):
        return command
    end = END.search(command, trainer.end())
    assert end is not None
    flags = SMALL.format(steps=2 if "--resume" in command else 1)
    return f"{command[: end.start()]} {flags}{command[end.start() :]}"
