"""Completion scripts for shells, by shtab: commands, the options each of them reads, their choices, files and folders.

The parser below is for shtab alone; `rlhf_trainer.options` reads the real command line, from the same fields.
"""

from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_origin, get_type_hints

from .commands import PlanOptions
from .config import TrainConfig
from .defaults import applies
from .flags import COMMANDS
from .names import ALGORITHMS, SAMPLING, SUPERVISED
from .options import flag_of

SHELLS = ("bash", "zsh", "fish")
FILES = ("prompts", "eval_prompts", "demonstrations")
FOLDERS = ("model", "reward_model", "output_dir")
CHOICES: dict[str, tuple[str, ...]] = {"algorithm": ALGORITHMS, "device": ("cpu", "cuda")}  # besides the declared ones


def script(shell: str) -> str:
    """What `shell` reads to complete `rlhf-train`."""
    import shtab

    return str(shtab.complete(command_line(shtab.FILE, shtab.DIRECTORY), shell)).rstrip() + "\n"


def command_line(file: Any, folder: Any) -> ArgumentParser:
    """The commands and their options; `file` and `folder` are what shtab takes for "a path of this kind"."""
    parser = ArgumentParser("rlhf-train", description="Train by RLHF")
    parser.add_argument("--version", action="store_true", help="what is installed")
    _path(parser, "--config", file, "YAML file of options")
    commands = parser.add_subparsers(dest="command")
    for name, summary in (SUPERVISED | SAMPLING).items():
        command = commands.add_parser(name, help=summary, description=summary)
        _path(command, "--config", file, "YAML file of options")
        options = (item for item in fields(TrainConfig) if item.name != "algorithm" and applies(item.name, name))
        _add_options(command, TrainConfig, options, file, folder)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == "plan":
            _path(command, "--config", file, "YAML file of a run's options")
            _add_options(command, PlanOptions, fields(PlanOptions), file, folder)
        elif name == "report":
            _path(command, "--output", folder, "where the pictures go")
            command.add_argument("run", nargs="+", help="output folder of a run").complete = folder  # type: ignore[attr-defined]
        elif name == "completion":
            command.add_argument("shell", choices=SHELLS)
        elif name == "config":
            command.add_argument("of", choices=ALGORITHMS)
        else:
            command.add_argument("--algorithm", choices=ALGORITHMS, help="what to run")
            _path(command, "--output", folder, "where the results go")
    return parser


def _path(parser: ArgumentParser, flag: str, kind: Any, text: str) -> None:
    parser.add_argument(flag, help=text).complete = kind  # type: ignore[attr-defined]


def _add_options(parser: ArgumentParser, cls: type, items: Iterable[Any], file: Any, folder: Any) -> None:
    """One flag a field; a switch that is on gets the flag that turns it off."""
    hints = get_type_hints(cls)
    for item in items:
        flag, text = flag_of(item.name), item.metadata["help"].replace("%", "%%")
        if hints[item.name] is bool:
            parser.add_argument("--no-" + flag[2:] if item.default is True else flag, action="store_true", help=text)
            continue
        nargs = "*" if get_origin(hints[item.name]) is list else None
        choices = item.metadata["choices"] or CHOICES.get(item.name)
        action = parser.add_argument(flag, nargs=nargs, choices=choices, help=text)
        if item.name in FILES + FOLDERS:
            action.complete = file if item.name in FILES else folder  # type: ignore[attr-defined]
