"""The task that every trainer of `python -m benchmarks rl` is given, as a directory: model, tokenizer, prompts, reward.

A Llama with random weights; its tokenizer knows a word a token ("t17"), so that text and tokens are one to one and
programs that pass text and programs that pass tokens see the same; nothing ends a completion before its length. The
reward adds up a fixed number for every token of the completion: a column of the output head, since a policy can learn
to raise what its head can express. Nothing here needs rlhf_kernels: other environments import this module.
"""

import json
import os
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

DIRECTORY = "RLHF_BENCHMARK_TASK"  # the environment variable that tells the reward where the task lies
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Task:
    """Sizes of the work and the settings that all trainers share; `samples` completions make one step."""

    dtype: str = "float32"
    layers: int = 8
    width: int = 512
    inner: int = 1376
    heads: int = 8
    vocabulary: int = 8192
    prompt_tokens: int = 32
    new_tokens: int = 64
    samples: int = 64
    generations: int = 1  # samples a prompt
    micro_batch: int = 8  # TRL's PPO cannot cut a minibatch: it runs whole
    mini_batches: int = 4  # optimiser steps an epoch
    epochs: int = 4
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 1e-3
    adam_epsilon: float = 1e-5
    kl_coef: float = 0.05
    prompts: int = 256
    steps: int = 100  # of the learning rate's schedule, which is constant: more than are run

    def tiny(self) -> "Task":
        return replace(
            self, layers=2, width=32, inner=48, heads=2, vocabulary=97, prompt_tokens=5, new_tokens=6, samples=8,
            micro_batch=2, prompts=8, rank=2,
        )  # fmt: skip

    def write(self, directory: Path) -> None:
        """Everything that a trainer reads."""
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, vocab_size=self.vocabulary,
            max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        model.to(getattr(torch, self.dtype)).save_pretrained(directory)
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(self.vocabulary)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
        column = model.lm_head.weight[:, 0].detach().float()
        scores = (
            (column - column.mean()) / column.std() / self.new_tokens**0.5
        )  # a random completion: 0, give or take 1
        (directory / "scores.json").write_text(json.dumps(scores.tolist()))
        (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in self.texts()))
        (directory / "task.json").write_text(json.dumps(asdict(self)))

    def texts(self) -> list[str]:
        draw = random.Random(0)
        return [
            " ".join(f"t{draw.randrange(self.vocabulary)}" for _ in range(self.prompt_tokens))
            for _ in range(self.prompts)
        ]


def read(directory: str | Path) -> Task:
    return Task(**json.loads((Path(directory) / "task.json").read_text()))


@cache
def token_scores() -> list[float]:
    """What each token is worth, of the task in the environment."""
    return json.loads((Path(os.environ[DIRECTORY]) / "scores.json").read_text())


def worth(tokens: Iterable[int]) -> float:
    scores = token_scores()
    return sum(scores[token] for token in tokens)


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The reward of completions as text, as trainers call it."""
    return [worth(int(word[1:]) for word in text.split()) for text in completions]
