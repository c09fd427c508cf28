"""Options of a dataclass: each field carries its help, choices and range; one parser (jsonargparse) reads all sources.

A YAML file, a list of flags and a Python constructor go through the same checks and fail with the same words.
Nothing here imports torch, so that `--help` is quick.
"""

import difflib
import math
import re
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import UserError, one_line

INDENT, WIDTH = 36, 100  # columns of --help: where the explanation begins and where it ends

SYNONYMS = {  # other trainers' words, for the hint of an error
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_ppo_epochs",
    "steps": "total_steps",
    "max_steps": "total_steps",
    "max_new_tokens": "max_completion_length",
    "dataset": "prompts",
    "data": "prompts",
    "reward_funcs": "reward",
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its help, allowed values and range (`least` <= value <= `most`, value > `above`)."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name a misspelt one most likely meant, or None."""
    known = list(known)
    if SYNONYMS.get(name) in known:
        return SYNONYMS[name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    inside = [k for k in known if name in k or k in name]
    return min(inside, key=len) if inside else None


def unknown(what: str, name: str, known: Iterable[str], spell: Any = str) -> UserError:
    """The error for a name that does not exist, with the nearest one that does."""
    close = nearest(name, known)
    hint = f"; did you mean {spell(close)}?" if close else ""
    return UserError(f"unknown {what} {spell(name)}{hint}")


def describe(annotation: Any) -> str:
    """A type in a reader's words: "a whole number or null"."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if annotation in plain:
        return plain[annotation]
    if get_origin(annotation) is list:
        items = {int: "whole numbers", float: "numbers", str: "texts"}
        return f"a list of {items[get_args(annotation)[0]]}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(a) for a in get_args(annotation))
    return str(annotation)


def build_parser(cls: type) -> Any:
    """A jsonargparse parser with one flag a field of dataclass `cls`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    hints = get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        flag = "--" + item.name
        if get_origin(hint) is list:
            default: Any = item.default_factory()  # type: ignore[misc,operator]
            parser.add_argument(flag, type=get_args(hint)[0], nargs="*", default=default)
        elif hint is bool:
            parser.add_argument(flag, type=bool, nargs="?", const=True, default=item.default)
        else:
            parser.add_argument(flag, type=hint, default=item.default)
    return parser


def flag_of(name: str) -> str:
    """A field's flag as help and errors spell it: "--kl-coef"."""
    return "--" + name.replace("_", "-")


def kinds_of(annotation: Any) -> list[Any]:
    """The types a field takes, without null: [int] for `int | None`, [str] for `list[str]`."""
    return [kind for kind in get_args(annotation) or (annotation,) if kind is not types.NoneType]


def default_of(item: Any) -> Any:
    """A field's default, also where it is made anew for each instance."""
    return item.default if item.default is not MISSING else item.default_factory()


def meaning(item: Any) -> str:
    """A field's help and, where there are such, its choices."""
    choices = item.metadata["choices"]
    return str(item.metadata["help"]) + (f": {', '.join(choices)}" if choices else "")


def help_text(
    cls: type, groups: Mapping[str, str], names: Iterable[str] | None = None, own: Mapping[str, Any] | None = None
) -> str:
    """A line for each option: its flag, what it takes, what it means, its default where that is not nothing.

    groups: a section's first field -> its title. names: only these options. own: what a default of None stands for.
    """
    shown = None if names is None else set(names)
    hints, lines, title = get_type_hints(cls), [], ""
    for item in fields(cls):
        title = groups.get(item.name, title)
        if shown is not None and item.name not in shown:
            continue
        if title:
            lines += ["", title + ":"]
            title = ""
        lines.append(_help_line(item, hints[item.name], own or {}))
    return "\n".join(lines).lstrip("\n")


def _help_line(item: Any, hint: Any, own: Mapping[str, Any]) -> str:
    letters = {int: "N", float: "X", str: "TEXT", bool: ""}
    many = " ..." if get_origin(hint) is list else ""
    flag = f"  {flag_of(item.name)} {letters[kinds_of(hint)[0]]}{many}".rstrip()
    text, default = meaning(item), default_of(item)
    if default is True:
        text += f" [on; --no-{item.name.replace('_', '-')}]"
    else:
        default = own.get(item.name) if default is None else default
        if default is not None and default is not False and default != []:
            text += f" [{default:g}]" if isinstance(default, float) else f" [{default}]"
    head = flag.ljust(INDENT) if len(flag) < INDENT - 1 else flag + "\n" + " " * INDENT
    return head + ("\n" + " " * INDENT).join(textwrap.wrap(text, WIDTH - INDENT, break_on_hyphens=False))


def typed(cls: type, parser: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the types of `cls`'s fields; UserError for an unknown key or a value of another type.

    Text that spells a number is taken as that number (YAML reads `1e-5` so); a lone value stands for a list of one.
    """
    hints = get_type_hints(cls)
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown("key", str(key), hints, repr)
        if get_origin(hints[key]) is list and (value is None or isinstance(value, str | int | float)):
            value = [] if value is None else [value]
        result[key] = _typed(parser, key, value, hints[key])
    return result


def _typed(parser: Any, key: str, value: Any, hint: Any) -> Any:
    wrong = UserError(f"{key}: expected {describe(hint)}, got {value!r}")
    kinds = get_args(hint) or (hint,)
    if (value is None and types.NoneType not in kinds) or (isinstance(value, bool) and bool not in kinds):
        raise wrong
    if str in kinds and isinstance(value, str):
        return value  # the parser would read "null" or "1" as something else
    try:
        return parser.parse_object({key: value}, defaults=False)[key]
    except Exception as error:  # jsonargparse raises several kinds; its words are about its own types
        raise wrong from error


def parse_flags(cls: type, parser: Any, argv: Sequence[str], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The flags that were given, by field name; dashes and underscores are the same.

    UserError, in one line, for an unknown flag (with the nearest known one), a missing or a wrong value.
    """
    hints = get_type_hints(cls)
    known = [*hints, *aliases]
    spelled: list[str] = []
    for word in argv:
        if not word.startswith("--"):
            spelled.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and hints.get(name[3:]) is bool and not equals:
            name, equals, value = name[3:], "=", "false"
        if name not in known:
            raise unknown("option", name, [*known, "config", "help", "debug"], flag_of)
        spelled.append(f"--{aliases.get(name, name)}{equals}{value}")
    try:
        return dict(vars(parser.parse_args(spelled, defaults=False)))
    except Exception as error:
        raise _flag_error(one_line(error), spelled, hints) from error


def _flag_error(message: str, argv: Sequence[str], hints: Mapping[str, Any]) -> UserError:
    named = re.search(r"key \"(\w+)\"|argument --(\w+)|--(\w+)", message)
    key = next((g for g in named.groups() if g), "") if named else ""
    if key not in hints:
        if stray := re.search(r"unrecognized arguments: (.*)", message, re.IGNORECASE):
            return UserError(f"unexpected argument {stray[1]!r}: every option is --name value")
        return UserError(message)
    flag = flag_of(key)
    got = ""
    for word, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = word.partition("=")
        if name == "--" + key:
            got = value if equals else following
    if got == "" or got.startswith("--"):
        return UserError(f"{flag}: expected {describe(hints[key])}, got nothing")
    return UserError(f"{flag}: expected {describe(hints[key])}, got {got!r}")


def check_ranges(instance: Any) -> None:
    """UserError for the first field of a dataclass outside its declared choices or range."""
    for item in fields(instance):
        value = getattr(instance, item.name)
        if value is None:
            continue
        for single in value if isinstance(value, list) else [value]:
            _check_value(item.name, single, item.metadata)


def _check_value(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    choices = allowed.get("choices")
    if choices and value not in choices:
        close = nearest(str(value), choices)
        hint = f" (did you mean {close!r}?)" if close else ""
        raise UserError(f"{name}: {value!r} is not one of {', '.join(choices)}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: must be finite, got {value}")
    if (least := allowed.get("least")) is not None and value < least:
        raise UserError(f"{name}: must be at least {least:g}, got {value}")
    if (most := allowed.get("most")) is not None and value > most:
        raise UserError(f"{name}: must be at most {most:g}, got {value}")
    if (above := allowed.get("above")) is not None and value <= above:
        raise UserError(f"{name}: must be above {above:g}, got {value}")
