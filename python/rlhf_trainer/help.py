"""What `--help` says: of the program, and of each algorithm what it needs, commands to start from, and its options.

Only options that an algorithm reads are shown to it, with its own defaults. Nothing here imports torch.
"""

import textwrap
from dataclasses import fields

from .config import GROUPS, TrainConfig
from .defaults import PPO, REWARD_MODEL, applies, own_defaults
from .flags import COMMANDS
from .names import SAMPLING, SUPERVISED
from .options import WIDTH, help_text

EXIT_CODES = {
    0: "done",
    1: "a fault of the program (its traceback is printed), or `demo --seeds` missed a limit",
    2: "the input cannot work, a reward failed, the disk is full: one line on stderr says what to mend",
    130: "interrupted by Ctrl-C; --resume goes on from the last checkpoint",
    143: "ended by SIGTERM; --resume goes on from the last checkpoint",
}

DATA = {  # what a row of --prompts holds
    "demonstrations": "rows of prompt and completion, of text, or of messages (a chat)",
    "preferences": "rows of prompt, chosen and rejected (texts or chats)",
    "prompts": "rows of prompt (text or a chat); their other columns reach the reward function",
}
SOURCES = "JSONL file, or NAME[:SPLIT] for `datasets`"
FUNCTION = "--reward pkg.mod:function, called as f(prompts, completions, **columns) -> list of scores"

REWARD = {  # where the reward comes from when --reward does not say
    **dict.fromkeys(PPO + REWARD_MODEL, "or the reward head of --reward-model, or else of --model (see `reward`)"),
    "j-hydra-ppo": "or the reward head of --model, the output of a `hydra-sft` run",
    "hydra-ppo": "or the reward head of --model, the output of a `hydra-sft` run",
    "pe-rlhf": "or --reward-model, the output of a `reward` run with --lora-r on the same --model",
}
LEAVES = {  # what else the output is good for
    "sft": "a model: the --model of every other algorithm",
    "reward": "a reward head on its model: the --reward-model of ppo, lora-ppo, remax; with --lora-r that of pe-rlhf",
    "hydra-sft": "one model with a language head and a reward head: the --model of hydra-ppo and j-hydra-ppo",
}
REAL_RUN = {  # after `rlhf-train ALGORITHM --model path/to/model`
    "sft": "--prompts demonstrations.jsonl --per-device-train-batch-size 8 --learning-rate 1e-5",
    "reward": "--prompts preferences.jsonl --learning-rate 1e-5",
    "hydra-sft": "--prompts preferences.jsonl --reward-loss-coef 0.1",
    "dpo": "--prompts preferences.jsonl --beta 0.05",
    "r-dpo": "--prompts preferences.jsonl --length-coef 0.02",
    "ppo": "--reward-model runs/reward --prompts prompts.jsonl --kv-memory 2GiB",
    "lora-ppo": "--reward-model runs/reward --prompts prompts.jsonl --lora-r 8 --lora-alpha 64",
    "j-hydra-ppo": "--prompts prompts.jsonl --lora-r 64 --memory-budget 16GiB",
    "hydra-ppo": "--prompts prompts.jsonl --lora-r 64 --memory-budget 16GiB",
    "ppo-max": "--prompts prompts.jsonl --reward my_rewards:helpful --demonstrations demonstrations.jsonl",
    "pe-rlhf": "--reward-model runs/reward --prompts prompts.jsonl --lora-r 16",
    "remax": "--prompts prompts.jsonl --reward my_rewards:helpful --kl-coef 0.05",
    "reinforce": "--prompts prompts.jsonl --reward my_rewards:helpful --baseline-decay 0.95",
    "rloo": "--prompts prompts.jsonl --reward my_rewards:helpful --num-generations 4",
    "raft": "--prompts prompts.jsonl --reward my_rewards:helpful --num-generations 8",
    "superhf": "--prompts prompts.jsonl --reward my_rewards:helpful --num-generations 16",
    "inpo": "--prompts prompts.jsonl --reward my_rewards:helpful --rounds 3",
}
TRY = "--total-steps 3 --max-completion-length 24"


def overview() -> str:
    """`rlhf-train --help`."""
    return f"""\
usage: rlhf-train ALGORITHM [--config FILE.yaml] [--option value ...]
       rlhf-train COMMAND ...

algorithms that learn from a file
{_table(SUPERVISED)}

algorithms that generate, and need a reward
{_table(SAMPLING)}

commands
{_table(COMMANDS)}

a first run, on the embedded model and data
  rlhf-train hydra-ppo --total-steps 3 --output runs/first

your own: the reward head first, then the policy
  rlhf-train hydra-sft --model path/to/model --prompts preferences.jsonl --output runs/base
  rlhf-train plan      --model runs/base --algorithm hydra-ppo --budget 16GiB
  rlhf-train hydra-ppo --model runs/base --prompts prompts.jsonl --output runs/hydra
  rlhf-train hydra-ppo --output runs/hydra --resume
  rlhf-train report    runs/hydra

`rlhf-train ALGORITHM --help`: what it needs, examples, its options. `rlhf-train COMMAND --help` likewise.
`--version`: what is installed. `--debug`: the traceback of an error.

exit codes
{_table({str(code): meaning for code, meaning in EXIT_CODES.items()})}"""


def algorithm_help(name: str) -> str:
    """`rlhf-train NAME --help`."""
    lines = [f"usage: rlhf-train {name} [--config FILE.yaml ...] [--option value ...]", ""]
    lines += [f"{name}: {(SUPERVISED | SAMPLING)[name]}.", "", "needs", *(f"  {line}" for line in _needs(name)), ""]
    lines += ["examples"]
    for comment, commands in examples(name):
        lines += [f"  # {comment}", *(f"  {broken(command)}" for command in commands)]
    shown = [item.name for item in fields(TrainConfig) if item.name != "algorithm" and applies(item.name, name)]
    groups = GROUPS | {"model": GROUPS["algorithm"]}
    hidden = len(fields(TrainConfig)) - 1 - len(shown)
    lines += ["", f"options; in brackets the defaults of {name}", ""]
    lines += [help_text(TrainConfig, groups, shown, own_defaults(name)), ""]
    lines += [f"{hidden} more options mean nothing to {name} and are left out here."] if hidden else []
    return "\n".join(lines)


def examples(name: str) -> list[tuple[str, list[str]]]:
    """(what it shows, its commands): what to start from."""
    out = f"runs/{name}"
    steps = TRY if name in SAMPLING else "--total-steps 3"
    return [
        ("a first try on the embedded model and data", [f"rlhf-train {name} {steps} --output runs/try"]),
        ("your own", [f"rlhf-train {name} --model path/to/model {REAL_RUN[name]} --output {out}"]),
        ("on from its last checkpoint, after any interruption", [f"rlhf-train {name} --output {out} --resume"]),
        (
            "all options in a file to edit; flags override it",
            [f"rlhf-train config {name} > run.yaml", f"rlhf-train --config run.yaml --seed 1 --output {out}-1"],
        ),
    ]


def _needs(name: str) -> list[str]:
    rows = [("--model", "a model in transformers' format; left out, the embedded one with its data")]
    if name in SUPERVISED:
        kind = "demonstrations" if name == "sft" else "preferences"
        rows.append(("--prompts", f"{SOURCES}: {DATA[kind]}"))
    else:
        rows += [("--prompts", f"{SOURCES}: {DATA['prompts']}"), ("a reward", FUNCTION)]
        rows.append(
            ("", REWARD.get(name, "or the reward head of --model, the output of a `reward` or `hydra-sft` run"))
        )
    if name in LEAVES:
        rows.append(("leaves", LEAVES[name]))
    texts = [textwrap.wrap(right, WIDTH - 14, break_on_hyphens=False) for _, right in rows]
    return [
        f"{left:12}{text[0]}" + "".join(f"\n{'':14}{more}" for more in text[1:]) for (left, _), text in zip(rows, texts)
    ]


def broken(command: str) -> str:
    """A command over several lines of a shell where it is long, cut before an option."""
    lines = textwrap.wrap(command.replace(" --", "\0--").replace(" ", "\1").replace("\0", " "), WIDTH - 8)
    return " \\\n      ".join(line.replace("\1", " ") for line in lines)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:12}  {text}" for name, text in rows.items())
