"""From the words of a command line to a TrainConfig: YAML files in their order, then flags over them."""

import warnings
from pathlib import Path
from typing import Any

from .config import TrainConfig, config_parser, read_yaml
from .defaults import applies
from .errors import UserError
from .names import ALGORITHMS
from .options import flag_of, nearest, parse_flags

ALIASES = {"output": "output_dir"}
COMMANDS = {  # besides the algorithms
    "demo": "train the embedded model on the embedded data, and show what came of it",
    "plan": "the bytes an algorithm needs, before anything is allocated",
    "config": "a commented YAML file of an algorithm's options",
    "report": "draw a run's report again, also while it runs; several runs in one picture",
    "completion": "completion of commands, options and values for bash, zsh or fish",
}


def load_config(words: list[str]) -> TrainConfig:
    """The configuration that `[ALGORITHM] [--config FILE ...] [--option value ...]` says; paths are not looked for.

    A later file overrides an earlier one, flags override files, the first word overrides both. With --resume and no
    file it is the run's own config.yaml. UserError for what cannot be read; a warning for a flag without effect.
    """
    values: dict[str, Any] = {}
    if words and not words[0].startswith("-"):
        values["algorithm"] = algorithm(words[0])
        words = words[1:]
    paths, words = take(words, "--config")
    flags = parse_flags(TrainConfig, config_parser(), words, ALIASES)
    base: dict[str, Any] = {}
    for path in paths:
        base |= read_yaml(path)
    if not paths and flags.get("resume"):
        recorded = Path(flags.get("output_dir", TrainConfig.output_dir)) / "config.yaml"
        base = read_yaml(recorded) if recorded.is_file() else {}
    if "algorithm" not in {**base, **flags, **values}:
        raise UserError(f"which algorithm? One of {', '.join(ALGORITHMS)}: rlhf-train ALGORITHM ...")
    config = TrainConfig.from_dict({**base, **flags, **values})
    for name in flags:
        if config.algorithm in ALGORITHMS and not applies(name, config.algorithm):
            warnings.warn(f"{flag_of(name)} has no effect on {config.algorithm}", stacklevel=2)
    return config


def algorithm(name: str) -> str:
    """The algorithm a word names; UserError with the nearest one."""
    if name in ALGORITHMS:
        return name
    close = nearest(name.replace("_", "-"), [*ALGORITHMS, *COMMANDS])
    hint = f"; did you mean {close}?" if close else f"; there are {', '.join(ALGORITHMS)}"
    raise UserError(f"unknown algorithm {name!r}{hint}")


def take(words: list[str], flag: str, what: str = "a file name") -> tuple[list[str], list[str]]:
    """The values of one flag, each time it is given, and the words without it."""
    rest: list[str] = []
    values: list[str] = []
    queue = iter(words)
    for word in queue:
        if word == flag:
            value = next(queue, "--")
            if value.startswith("--"):
                raise UserError(f"{flag}: expected {what}, got nothing")
            values.append(value)
        elif word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    return values, rest
