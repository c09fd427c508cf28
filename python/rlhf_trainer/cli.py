"""`rlhf-train ALGORITHM | plan | demo`: flags over a YAML file, one line and exit code 2 for what cannot work.

torch is imported only once the input has been read and checked.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .config import GROUPS, TrainConfig, config_parser, read_yaml
from .errors import PeerError, UserError, one_line
from .names import ALGORITHMS, SAMPLING, SUPERVISED
from .options import build_parser, check_ranges, help_text, nearest, option, parse_flags
from .processes import leave, speaks

ALIASES = {"output": "output_dir"}
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes: a usage error, and 128 + SIGINT

OVERVIEW = f"""\
usage: rlhf-train ALGORITHM [--config FILE.yaml] [--option value ...]
       rlhf-train plan [--model PATH] [--algorithm NAME] [--batch N] ...
       rlhf-train demo [--algorithm NAME] ...

ALGORITHM
{chr(10).join(f"  {name:12}  {summary}" for name, summary in (SUPERVISED | SAMPLING).items())}

  plan          the bytes each of them needs, before anything is allocated
  demo          train the embedded model on the embedded data

`rlhf-train ALGORITHM --help` lists the options; `--debug` shows the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 0, or 2 after one line on stderr that says what was wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return dispatch(words)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            sys.stdout = None  # type: ignore[assignment]
            return 0
        except KeyboardInterrupt:
            if speaks():
                print("rlhf-train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if not expected(error):
                raise
            if debug:
                traceback.print_exc()
            if speaks():
                print(f"rlhf-train: error: {one_line(error)}", file=sys.stderr)
            return BAD_INPUT


def dispatch(words: list[str]) -> int:
    """The command that the first word names."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0
    if words[0] == "plan":
        return plan_command(words[1:])
    if words[0] == "demo":
        from .demo.run import main as demo

        return int(demo(words[1:]) or 0)
    return train_command(words)


def train_command(words: list[str]) -> int:
    """Train; everything about the input is checked before the output directory is touched."""
    config = load_config(words)
    if config is None:
        return 0
    config = config.validate()
    _quiet_libraries()
    from . import train

    result = train(config)
    leave()
    if speaks():
        print(f"{config.algorithm}: {result.step} steps, results in {result.output_dir}")
    return 0


def load_config(words: list[str]) -> TrainConfig | None:
    """A YAML file (or, with --resume, the run's own config.yaml), then flags over it; None after printing the help."""
    values: dict[str, Any] = {}
    if words and not words[0].startswith("-"):
        values["algorithm"] = algorithm(words[0])
        words = words[1:]
    if "--help" in words or "-h" in words:
        print(f"usage: rlhf-train {values.get('algorithm', 'ALGORITHM')} [--config FILE.yaml] [--option value ...]\n")
        print(help_text(TrainConfig, GROUPS))
        return None
    path, words = take(words, "--config")
    flags = parse_flags(TrainConfig, config_parser(), words, ALIASES)
    base: dict[str, Any] = {}
    if path is not None:
        base = read_yaml(path)
    elif flags.get("resume"):
        recorded = Path(flags.get("output_dir", TrainConfig.output_dir)) / "config.yaml"
        base = read_yaml(recorded) if recorded.is_file() else {}
    if "algorithm" not in {**base, **flags, **values}:
        raise UserError(f"which algorithm? One of {', '.join(ALGORITHMS)}: rlhf-train ALGORITHM ...")
    return TrainConfig.from_dict({**base, **flags, **values})


def algorithm(name: str) -> str:
    """The algorithm a word names; UserError with the nearest one."""
    if name in ALGORITHMS:
        return name
    close = nearest(name.replace("_", "-"), [*ALGORITHMS, "plan", "demo"])
    hint = f"; did you mean {close}?" if close else f"; there are {', '.join(ALGORITHMS)}"
    raise UserError(f"unknown algorithm {name!r}{hint}")


def take(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of one flag (the last, if given twice) and the words without it."""
    rest: list[str] = []
    value: str | None = None
    queue = iter(words)
    for word in queue:
        if word == flag:
            value = next(queue, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{flag}: expected a file name, got nothing")
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


@dataclass
class PlanOptions:
    """The options of `rlhf-train plan`."""

    model: str = option("demo", "directory in transformers' format, hub id, or demo: the embedded checkpoint")
    algorithm: str | None = option(None, "one algorithm in detail; default: all of them side by side")
    batch: int = option(32, "sequences at once", least=1)
    prompt: int = option(256, "tokens of a prompt", least=1)
    response: int = option(256, "tokens of a completion", least=1)
    lora_rank: int = option(16, "of each adapter", least=1)
    dtype: str = option("bfloat16", "of the weights", choices=("float32", "bfloat16"))
    optimizer: str = option("adamw", "what is kept for each trained parameter", choices=("adamw", "sgd"))
    target_modules: str = option("all-linear", "all-linear (of the decoder layers) or names separated by commas")
    kv_memory: str | int | None = option(None, "bytes of the KV arena; default: what the batch needs")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    reward_model: bool = option(True, "hold a reward model; false: the reward is a function")
    budget: str | int | None = option(None, "find the largest batch within these bytes, such as 80GiB")


def plan_command(words: list[str]) -> int:
    """Print the memory table of one algorithm, or of all."""
    if "--help" in words or "-h" in words:
        print("usage: rlhf-train plan [--option value ...]\n\n" + help_text(PlanOptions, {}))
        return 0
    options = PlanOptions(**parse_flags(PlanOptions, build_parser(PlanOptions), words, {}))
    check_ranges(options)
    keywords: dict[str, Any] = {
        f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("model", "algorithm")
    }
    if "," in options.target_modules:
        keywords["target_modules"] = [name.strip() for name in options.target_modules.split(",")]
    path = options.model
    if path == "demo":
        from .demo import checkpoint_path

        path = str(checkpoint_path())
    _quiet_libraries()
    from rlhf_kernels.memory import comparison, plan

    if options.algorithm is None:
        print(comparison(path, **keywords))
    else:
        print(plan(path, options.algorithm, **keywords).table())
    return 0


def expected(error: Exception) -> bool:
    """Whether an error is about the user's input: ours by class, or a ValueError that this project's code raised."""
    if isinstance(error, UserError | PeerError):
        return True
    if not isinstance(error, ValueError | FloatingPointError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return module.partition(".")[0] in ("rlhf_kernels", "rlhf_trainer")


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if speaks():
        print(f"rlhf-train: warning: {one_line(message)}", file=sys.stderr)


def _quiet_libraries() -> None:
    """No loading bars and no advice from libraries between our lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()

    logging.disable_progress_bar()
