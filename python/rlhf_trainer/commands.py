"""The commands that do not train: plan, config, report, completion, version. Each takes the words after its name."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from .defaults import SIZES, own_defaults
from .errors import UserError, one_line
from .flags import load_config, take
from .names import ALGORITHMS
from .options import build_parser, check_ranges, help_text, nearest, option, parse_flags


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


OF_A_RUN = {  # an option of plan, and the option of a run's configuration that says the same
    "model": "model",
    "algorithm": "algorithm",
    "batch": "per_device_train_batch_size",
    "prompt": "max_prompt_length",
    "response": "max_completion_length",
    "lora_rank": "lora_r",
    "dtype": "dtype",
    "target_modules": "lora_target_modules",
    "kv_memory": "kv_memory",
    "gradient_checkpointing": "gradient_checkpointing",
    "budget": "memory_budget",
}

PLAN_HELP = """\
usage: rlhf-train plan [--config FILE.yaml] [--option value ...]

The bytes that weights, gradients, optimiser, rollout and update take, from shapes alone: the model is not loaded.

examples
  # every algorithm on the embedded model, side by side
  rlhf-train plan
  # one in detail, and the largest batch that 80 GiB hold
  rlhf-train plan --model path/to/model --algorithm hydra-ppo --budget 80GiB
  # of the run that a file describes, with another batch
  rlhf-train plan --config run.yaml --batch 64

options
"""

CONFIG_HELP = """\
usage: rlhf-train config ALGORITHM [--config FILE.yaml] [--option value ...]

Prints a YAML file with every option that the algorithm reads, what it means and its default. Options given here are
written into it; the others stand behind a #.

examples
  rlhf-train config hydra-ppo > run.yaml
  rlhf-train config remax --model path/to/model --prompts prompts.jsonl --reward my_rewards:helpful > run.yaml
  rlhf-train --config run.yaml --seed 1 --output runs/seed1"""

REPORT_HELP = """\
usage: rlhf-train report RUN [RUN ...] [--output FOLDER]

Draws report.html and plots/*.png from what a run has recorded (metrics.jsonl, samples.jsonl, config.yaml), into its
folder. The run may be finished, interrupted or still running. Several runs are drawn in one picture each metric, with
a table of where they came to and of the options in which they differ, into FOLDER (default: comparison).

examples
  rlhf-train report runs/hydra
  rlhf-train report runs/hydra runs/remax runs/rloo --output runs/compared"""

COMPLETION_HELP = """\
usage: rlhf-train completion bash|zsh|fish

Prints a script for the shell, which completes commands, options and values.

examples
  source <(rlhf-train completion bash)                                         # now; in ~/.bashrc for good
  rlhf-train completion zsh > ~/.zfunc/_rlhf-train                             # a folder of $fpath
  rlhf-train completion fish > ~/.config/fish/completions/rlhf-train.fish"""


def run_command(name: str, words: list[str]) -> int:
    """Runs command `name`; returns the exit code. UserError for words that cannot be."""
    work, text = _TABLE[name]
    if "--help" in words or "-h" in words:
        print(text())
        return 0
    work(words)
    return 0


def plan_command(words: list[str]) -> None:
    """Print the memory table of one algorithm, or of all."""
    paths, words = take(words, "--config")
    described = _of_a_run(paths) if paths else {}
    options = PlanOptions(**described | parse_flags(PlanOptions, build_parser(PlanOptions), words, {}))
    check_ranges(options)
    if options.algorithm is not None and options.algorithm not in ALGORITHMS:
        close = nearest(options.algorithm, ALGORITHMS)
        raise UserError(
            f"--algorithm: {options.algorithm!r} is not one of {', '.join(ALGORITHMS)}"
            + (f"; did you mean {close}?" if close else "")
        )
    keywords: dict[str, Any] = {
        f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("model", "algorithm")
    }
    if "," in options.target_modules:
        keywords["target_modules"] = [name.strip() for name in options.target_modules.split(",")]
    path = options.model
    if path == "demo":
        from .demo import checkpoint_path

        path = str(checkpoint_path())
    quiet_libraries()
    from rlhf_kernels.memory import comparison, plan

    if options.algorithm is None:
        print(comparison(path, **keywords))
    else:
        print(plan(path, options.algorithm, **keywords).table())


def _of_a_run(paths: list[str]) -> dict[str, Any]:
    """Plan's options as the configuration files of a run say them, or as its algorithm has them by default."""
    config = load_config([word for path in paths for word in ("--config", path)])
    own = own_defaults(config.algorithm)
    if config.memory_budget is not None:  # which the plan then fills
        own = {name: value for name, value in own.items() if name not in SIZES}
    said = {name: getattr(config, key) for name, key in OF_A_RUN.items()}
    values = {name: own.get(OF_A_RUN[name]) if value is None else value for name, value in said.items()}
    values["reward_model"] = not config.reward
    return {name: value for name, value in values.items() if value is not None and (name, value) != ("lora_rank", 0)}


def config_command(words: list[str]) -> None:
    """Print a commented YAML file."""
    from .template import template

    config = load_config(words)
    check_ranges(config)
    print(template(config), end="")


def report_command(words: list[str]) -> None:
    """Draw the report of one run, or of several together."""
    targets, rest = take(words, "--output", "a folder")
    if odd := next((word for word in rest if word.startswith("-")), None):
        raise UserError(f"unknown option {odd}; report takes folders of runs and --output")
    if not rest:
        raise UserError("report: which run? Give its output folder: rlhf-train report RUN [RUN ...]")
    target = targets[-1] if targets else None
    from .compare import compare
    from .report import read_run, write_report

    try:
        page = write_report(rest[0], target) if len(rest) == 1 else compare(rest, target or "comparison")
    except OSError as error:
        raise UserError(f"report: {one_line(error)}") from error
    for folder in rest:
        run = read_run(folder)
        print(f"{run.folder}: {run.algorithm}, {run.progress}")
    print(f"{page}, {len(list((page.parent / 'plots').glob('*.png')))} pictures in {page.parent / 'plots'}")


def completion_command(words: list[str]) -> None:
    """Print a shell's completion script."""
    from .completion import SHELLS, script

    if len(words) != 1 or words[0] not in SHELLS:
        got = repr(" ".join(words)) if words else "nothing"
        raise UserError(f"completion: expected one of {', '.join(SHELLS)}, got {got}")
    print(script(words[0]), end="")


def version_line() -> str:
    """ "rlhf-train 0.1.0 (Python 3.11.7, torch 2.13.0, ...)"; nothing of it is imported."""
    from rlhf_kernels import __version__

    found = [f"Python {python_version()}"]
    for package in ("torch", "triton", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"rlhf-train {__version__} ({', '.join(found)})"


def quiet_libraries() -> None:
    """No loading bars and no advice from libraries between our lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()

    logging.disable_progress_bar()


_TABLE: dict[str, tuple[Callable[[list[str]], None], Callable[[], str]]] = {
    "plan": (plan_command, lambda: PLAN_HELP + help_text(PlanOptions, {})),
    "config": (config_command, lambda: CONFIG_HELP),
    "report": (report_command, lambda: REPORT_HELP),
    "completion": (completion_command, lambda: COMPLETION_HELP),
}
