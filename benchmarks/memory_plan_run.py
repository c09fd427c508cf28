"""Runs of the real trainer, each in a process whose live bytes are counted: what a memory plan is held against.

    LD_PRELOAD=live_bytes.so python -m benchmarks.memory_plan_run     with a line of JSON (see Work) on stdin for each

The measure is exact: `live_bytes.c` stands before malloc and counts what is live, in our kernels, the libraries and
torch alike. A first run of a tiny model loads code and makes threads, so that they are on nobody's bill. Peaks are
taken for each phase of a step (rollout, scoring, forward and backward, optimiser), over all steps but the first, whose
optimiser has no state yet.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORDS = "the value of this object is a list of names that the module reads before it calls the function again "
SIZES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary; about 1, 10 and 60 million parameters
    "tiny": (64, 176, 2, 4, 2, 1024),
    "1M": (128, 344, 4, 4, 2, 1024),
    "10M": (320, 864, 6, 5, 5, 4096),
    "60M": (640, 1728, 9, 10, 5, 16384),
}
KV_MEMORY = {"tiny": "1MiB", "1M": "4MiB", "10M": "8MiB", "60M": "16MiB"}
# Of the smallest model's peak a fifth is what oneDNN keeps for each length of a bf16 row: two steps do not show it all.
STEPS = {"tiny": 2, "1M": 6, "10M": 2, "60M": 2}


@dataclass(frozen=True)
class Work:
    """One run. Tokens are of each prompt and completion; `batch` is a micro-batch, two of which make a minibatch."""

    algorithm: str
    size: str
    dtype: str = "float32"
    checkpointing: bool = False
    batch: int = 4
    prompt: int = 64
    response: int = 64
    lora_rank: int = 16


class Meter:
    """The live bytes of malloc above what was live when it was made, and their peaks by phase."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name in ("live_bytes", "peak_bytes"):
            getattr(self._library, name).restype = ctypes.c_long
        gc.collect()
        self.start = self._library.live_bytes()
        self.peaks: dict[str, int] = {}
        self.on = True

    def phase(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose peak counts as that of `name`."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            self._library.reset_peak()
            result = function(*args, **kwargs)
            if self.on:
                self.peaks[name] = max(self.peaks.get(name, 0), self._library.peak_bytes() - self.start)
            return result

        return measured


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Any function will do."""
    return [float(len(text) % 7) for text in completions]


def make_model(size: str, dtype: str, folder: Path, weights: bool) -> str:
    """A random Llama of that size on disk (or its config alone), with the demo's tokenizer.

    It is kept in the other dtype: weights in their own would stay mapped from the file, out of the allocator's sight.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from rlhf_trainer.demo import checkpoint_path

    place = folder / size
    hidden, inner, layers, heads, kv_heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1024, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(place)
    if not weights:
        return str(place)
    other = torch.bfloat16 if dtype == "float32" else torch.float32
    model: Any = LlamaForCausalLM(config)
    model.to(other).save_pretrained(place)
    AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(place)
    return str(place)


def make_data(folder: Path, tokens: int, rows: int = 16) -> str:
    """Prompts, demonstrations and preferences in one file, all longer than they are cut to."""
    file = folder / "data.jsonl"
    words = WORDS.split()
    lines = []
    for i in range(rows):
        text, other = (" ".join((words * (2 + tokens // len(words)))[j : j + tokens]) for j in (i, i + 1))
        lines.append(json.dumps({"prompt": text, "completion": text, "chosen": text, "rejected": other}))
    file.write_text("\n".join(lines))
    return str(file)


def settings(work: Work, folder: Path, weights: bool = True) -> dict[str, Any]:
    """The configuration of a run: two micro-batches a minibatch, one minibatch a rollout."""
    from rlhf_trainer.algorithms import find

    row = find(work.algorithm)
    values: dict[str, Any] = {
        "algorithm": work.algorithm,
        "model": make_model(work.size, work.dtype, folder, weights),
        "prompts": make_data(folder, max(work.prompt, work.response) + 8),
        "output_dir": str(folder / "out"),
        "dtype": work.dtype,
        "gradient_checkpointing": work.checkpointing,
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": 2,
        "max_prompt_length": work.prompt,
        "max_completion_length": work.response,
        "total_steps": STEPS[work.size],
        "save_steps": 0,
        "report": False,
    }
    if row.defaults.get("lora_r"):
        values |= {"lora_r": work.lora_rank}
    if row.data is None:
        samples = row.least_generations
        trained = row.group if row.select is not None else samples  # completions of a prompt that are trained on
        values |= {
            "num_generations": samples,
            "rollout_batch_size": 2 * work.batch // trained,
            "num_ppo_epochs": 1,
            "critic_warmup_steps": 0,
            "kv_memory": KV_MEMORY[work.size],
            "reward": ["benchmarks.memory_plan_run:reward"],
        }
    return values


def run(work: Work, folder: Path) -> dict[str, Any]:
    """Trains; returns static bytes of live tensors and the peak of each phase."""
    from rlhf_trainer.algorithms import find, with_defaults
    from rlhf_trainer.config import TrainConfig
    from rlhf_trainer.core import build_phase
    from rlhf_trainer.models import load_tokenizer

    config = with_defaults(TrainConfig(**settings(work, folder)).validate())
    tokenizer = load_tokenizer(config)
    meter = Meter()
    phase, policy = build_phase(config, find(config.algorithm), tokenizer)
    found = {"static": 0}
    optimizer = phase.optimizer
    step = meter.phase("optimiser", optimizer.step)

    def stepped(*only: Any) -> dict[str, float]:
        update_ends(meter)
        gradients = sum(p.grad.nbytes for p in policy.trained.values() if p.grad is not None)
        metrics = step(*only)
        state = sum(t.nbytes for t in optimizer.state_tensors().values())
        found["static"] = gradients + sum(p.nbytes for p in policy.model.parameters()) + state
        meter._library.reset_peak()
        return metrics

    optimizer.step = stepped  # type: ignore[assignment, method-assign]
    sampler = getattr(phase, "sampler", None)
    if sampler is not None:
        sampler.sample = meter.phase("rollout", sampler.sample)
        sampler.score = meter.phase("scoring", sampler.score)
    for number in range(STEPS[work.size]):
        meter.on = number > 0
        meter._library.reset_peak()
        phase.step(number)
        gc.collect()
        idle = meter._library.live_bytes() - meter.start
    return {"static": found["static"], "idle": idle, "peaks": meter.peaks}


def planned(work: Work, folder: Path) -> dict[str, Any]:
    """What the plan says of the same configuration, from the model's config alone."""
    from rlhf_trainer.algorithms import find, with_defaults
    from rlhf_trainer.budget import Lengths, plan_of
    from rlhf_trainer.config import TrainConfig

    config = with_defaults(TrainConfig(**settings(work, folder, weights=False)).validate())
    found = plan_of(config, find(config.algorithm), Lengths(work.prompt, work.response))
    return {"static": found.static, "peaks": found.peaks, "parameters": found.parameters}


def update_ends(meter: Meter) -> None:
    if meter.on:
        peak = meter._library.peak_bytes() - meter.start
        meter.peaks["update"] = max(meter.peaks.get("update", 0), peak)


def main() -> None:
    """A run for every line of stdin, each in a process forked from this one, which has loaded code and nothing else."""
    from transformers.utils import logging

    from rlhf_trainer import core  # noqa: F401

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _measure(Work(**json.loads(line)))
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"error": f"status {status}"}), flush=True)


def _measure(work: Work) -> None:
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run(Work(work.algorithm, "tiny", work.dtype, work.checkpointing, 2, 8, 8), folder)
            found = run(work, folder)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
