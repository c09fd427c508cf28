"""`rlhf-train demo` (and `make demo`): the embedded model, from preference pairs to a better policy, in minutes.

Hydra-SFT trains the reward head on the pairs; the chosen algorithm then trains the policy; gold scores on held-out
prompts, controls, completions and a memory table say what came of it. Everything is written below one folder.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NoReturn

from rlhf_trainer.demo.settings import TUNED
from rlhf_trainer.errors import UserError
from rlhf_trainer.lock import FILE as LOCK
from rlhf_trainer.lock import DirectoryLock
from rlhf_trainer.options import nearest

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf_trainer.demo.evaluate import Comparison, Sampled

RECORD = "demo.json"  # its presence says that a folder is a demo's and may be written anew
QUIET_STEPS = 10  # steps between lines of the terminal


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"demo: {message}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The demo's options; UserError, in one line, for one that cannot be."""
    parser = _Parser(prog="rlhf-train demo", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--algorithm", default="hydra-ppo", help=" | ".join(TUNED))
    parser.add_argument("--output", "--output-dir", type=Path, default=Path("output/demo"), help="where the results go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="fewer or more rollouts than the tuned number")
    parser.add_argument("--sft-steps", type=int, default=None, help="the same for Hydra-SFT")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory table out")
    parser.add_argument("--seeds", type=int, default=0, help="only scores: this many seeds of every --algorithms")
    parser.add_argument("--algorithms", default="all", help="for --seeds: names separated by commas, or all")
    options = parser.parse_args(list(argv))
    names = tuple(TUNED) if options.algorithms == "all" else tuple(options.algorithms.split(","))
    for name in (options.algorithm, *names):
        if name not in TUNED:
            close = nearest(name, TUNED)
            hint = f"; did you mean {close}?" if close else ""
            raise UserError(f"demo: algorithm {name!r} is not one of {', '.join(TUNED)}{hint}")
    for name in ("steps", "sft_steps"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"demo: --{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    options.algorithms = names
    return options


def main(argv: Sequence[str] = ()) -> int:
    """Run the demo: 0. With --seeds: 1 when an algorithm's mean rise or one of its controls misses its limit."""
    options = parse(argv)
    fresh_folder(options.output)
    quiet()
    if options.seeds:
        from rlhf_trainer.demo.seeds import study

        return study(options.algorithms, options.seeds, options.output)
    from rich.console import Console

    console = Console(record=True, width=None if Console().is_terminal else 120)
    started = time.perf_counter()
    run(options, console)
    console.print(f"\n{time.perf_counter() - started:.0f} s; everything is in [bold]{options.output}[/bold]")
    console.save_html(str(options.output / "demo.html"), clear=False)
    return 0


def run(options: argparse.Namespace, console: "Console") -> None:
    """All parts of the demo in turn."""
    from rlhf_trainer.demo import show

    base, output = options.output / "hydra-sft", options.output / options.algorithm
    console.rule("1  Hydra-SFT: language head and reward head on the preference pairs")
    train_base(base, options.seed, options.sft_steps)
    console.rule(f"2  {options.algorithm}")
    before, after, result = train_policy(options.algorithm, base, output, options.seed, options.steps)
    console.rule("3  What came of it")
    console.print(show.completions_table(before, after))
    console.print(show.comparison_table(options.algorithm, result))
    start = embedded_checkpoint(base)
    console.print(
        f"before: the Hydra-SFT model that {options.algorithm} starts from; the embedded checkpoint, before "
        f"any preference pair, scores {start:.1f} (real sentences: {real_sentences():.1f})"
    )
    record: dict[str, Any] = {"algorithm": options.algorithm, "seed": options.seed, "result": result.as_dict()}
    show.draw_gold(before, after, output / "plots" / "gold.png")
    if not options.no_memory:
        console.rule("4  What it takes: five algorithms, each in a process of its own")
        rows = memory_rows(base)
        console.print(show.memory_table(rows))
        show.draw_memory(rows, output / "plots" / "memory_by_algorithm.png")
        record["memory"] = [
            asdict(got) | {"planned_static_bytes": plan.static, "planned_peak_bytes": plan.total} for plan, got in rows
        ]
    (options.output / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    pictures = sorted(p.name for p in (output / "plots").glob("*.png"))
    console.print(f"curves: {output / 'report.html'}, {', '.join(pictures)}")


def train_base(base: Path, seed: int, steps: int | None = None) -> None:
    """Hydra-SFT from the embedded checkpoint into the folder `base`."""
    from rlhf_trainer import train
    from rlhf_trainer.demo import settings

    changes: dict[str, Any] = {"logging_steps": 5 * QUIET_STEPS}
    result = train(settings.hydra_sft(base, seed, **changes | ({} if steps is None else {"total_steps": steps})))
    last = result.history[-20:]
    right = sum(row["rewards/accuracies"] for row in last) / len(last)
    print(f"the reward head tells the better of two completions in {right:.0%} of the last {len(last)} batches")


def train_reward_adapter(base: Path, seed: int, steps: int | None = None) -> None:
    """The reward model of pe-rlhf from the preference pairs: an adapter on the model in `base`, below it."""
    from rlhf_trainer import train
    from rlhf_trainer.demo import settings

    changes: dict[str, Any] = {"logging_steps": 5 * QUIET_STEPS}
    train(settings.reward_adapter(base, seed, **changes | ({} if steps is None else {"total_steps": steps})))


def train_policy(
    algorithm: str, base: Path, output: Path, seed: int, steps: int | None = None, **changes: Any
) -> "tuple[Sampled, Sampled, Comparison]":
    """One run from `base` into `output`, and the held-out samples before and after it, compared."""
    from transformers import AutoTokenizer

    from rlhf_trainer import train
    from rlhf_trainer.demo import evaluate, settings

    changes = {"logging_steps": QUIET_STEPS} | changes | ({} if steps is None else {"total_steps": steps})
    if algorithm == "pe-rlhf":
        train_reward_adapter(base, seed, steps)
    train(settings.policy(algorithm, base, output, seed, **changes))
    tokenizer, prompts, sft = AutoTokenizer.from_pretrained(base), evaluate.held_out_prompts(), evaluate.load_sft(base)
    before = evaluate.sample(sft, sft, tokenizer, prompts)
    after = evaluate.sample(evaluate.load_policy(base, output), sft, tokenizer, prompts)
    return before, after, evaluate.compare(before, after)


def embedded_checkpoint(base: Path) -> float:
    """Mean gold score of the embedded checkpoint's own samples, which no preference has touched."""
    from transformers import AutoTokenizer

    from rlhf_trainer.demo import checkpoint_path, evaluate

    tokenizer, sft = AutoTokenizer.from_pretrained(base), evaluate.load_sft(base)
    checkpoint = evaluate.load_sft(Path(checkpoint_path()))
    return fmean(evaluate.sample(checkpoint, sft, tokenizer, evaluate.held_out_prompts()).gold)


def real_sentences() -> float:
    """Mean gold score of the documentation's own sentences."""
    from rlhf_trainer.demo import data_path
    from rlhf_trainer.demo.gold import embedded

    rows = [json.loads(line) for line in Path(data_path("demonstrations")).read_text(encoding="utf-8").splitlines()]
    return fmean(embedded().score(row["prompt"], row["completion"], True) for row in rows)


def memory_rows(base: Path) -> list[Any]:
    """(plan, measured) for every algorithm, from the largest layout to the smallest."""
    from rlhf_trainer.algorithms import find, with_defaults
    from rlhf_trainer.budget import Lengths, plan_of
    from rlhf_trainer.demo import measure, settings

    rows = []
    for algorithm in ("ppo", "lora-ppo", "j-hydra-ppo", "hydra-ppo", "remax"):
        got = measure.in_fresh_process(algorithm, base)
        config = with_defaults(settings.online(algorithm, base, base))
        planned = plan_of(config, find(algorithm), Lengths(got.prompt_tokens, got.completion_tokens))
        rows.append((planned, got))
    return rows


def fresh_folder(folder: Path) -> None:
    """An empty folder for the results; a former demo's is cleared, anything else is left alone."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"demo: output {str(folder)!r} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / RECORD).is_file():
            raise UserError(f"demo: output {str(folder)!r} holds something else; give another --output")
        for held in folder.rglob(LOCK):
            with DirectoryLock(held.parent) as lock:
                lock.take(make=False)  # UserError while a demo is at work there
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text("{}\n")


def quiet() -> None:
    """No bars and no advice from libraries between our lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
