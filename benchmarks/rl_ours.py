"""rlhf_trainer's side of `python -m benchmarks rl`: the process that takes its steps."""

import json
import os
import sys
import tempfile
from pathlib import Path

import transformers.models.llama.modeling_llama

import rlhf_trainer.core
from benchmarks.rl_task import DIRECTORY, LINEARS, read
from benchmarks.rl_turns import Turns
from rlhf_trainer.algorithms import find, with_defaults
from rlhf_trainer.config import TrainConfig
from rlhf_trainer.models import load_tokenizer

LIBRARIES = (transformers.models.llama.modeling_llama, rlhf_trainer.core)  # on nobody's bill
NO_CLIPPING = 1e9  # TRL's PPO does not clip gradients


def main(algorithm: str, kv_memory: str) -> None:
    turns, directory = Turns(), Path(os.environ[DIRECTORY])
    task = read(directory)
    config = with_defaults(
        TrainConfig(
            algorithm=algorithm,
            model=str(directory),
            prompts=str(directory / "prompts.jsonl"),
            reward=["benchmarks.rl_task:reward"],
            output_dir=tempfile.gettempdir(),
            dtype=task.dtype,
            lora_r=task.rank,
            lora_alpha=task.alpha,
            lora_target_modules=",".join(LINEARS),
            total_steps=task.steps,
            rollout_batch_size=task.samples // task.generations,
            num_generations=task.generations,
            per_device_train_batch_size=task.micro_batch,
            num_mini_batches=task.mini_batches,
            num_ppo_epochs=task.epochs,
            learning_rate=task.learning_rate,
            adam_epsilon=task.adam_epsilon,
            weight_decay=0.0,
            adam_beta2=0.999,
            max_grad_norm=NO_CLIPPING,
            max_completion_length=task.new_tokens,
            kv_memory=kv_memory,
            kl_coef=task.kl_coef,
        ).validate()
    )
    phase, _ = rlhf_trainer.core.build_phase(config, find(algorithm), load_tokenizer(config))
    for step in range(task.steps):
        turns.wait()
        turns.done(phase.step(step)["reward"])


main(**json.loads(sys.argv[1]))
