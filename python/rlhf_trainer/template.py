"""The commented YAML of `rlhf-train config ALGORITHM`: every option that the algorithm reads, with its meaning.

Options that were given are live lines; the others stand behind a # with the value they have without being said, so that
taking the # away changes nothing until the value is changed too.
"""

import textwrap
from dataclasses import fields
from typing import Any

from .config import GROUPS, TrainConfig
from .defaults import applies, own_defaults
from .names import SAMPLING, SUPERVISED
from .options import default_of, meaning

COLUMN, WIDTH = 44, 116  # where the comments begin and end
LIVE = ("algorithm", "model", "output_dir", "seed")


def template(config: TrainConfig) -> str:
    """A YAML file that `--config` reads as `config`."""
    name, own = config.algorithm, own_defaults(config.algorithm)
    lines = [
        f"## The options that {name} reads. Behind a # stand its defaults.",
        "## rlhf-train --config THIS_FILE [--option value ...]: flags override it.",
    ]
    title = ""
    for item in fields(TrainConfig):
        title = GROUPS.get(item.name, title)
        if not applies(item.name, name):
            continue
        if title:
            lines += ["", f"## {title}"]
            title = ""
        value = getattr(config, item.name)
        given = item.name in LIVE or value != default_of(item)
        text = (SUPERVISED | SAMPLING)[name] if item.name == "algorithm" else meaning(item)
        lines += _entry(item.name, own.get(item.name) if value is None else value, given, text)
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, live: bool, text: str) -> list[str]:
    """`name: value  # text`, the text going on in the same column."""
    import yaml

    spelt = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    )
    entry = f"{'' if live else '# '}{name}: {spelt}"
    first, *rest = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False)
    lines = [f"{entry.ljust(COLUMN - 1)} # {first}"]
    return lines + [" " * COLUMN + f"# {more}" for more in rest]
