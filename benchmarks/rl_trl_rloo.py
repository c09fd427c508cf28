"""TRL's RLOO: the process that takes its steps. The reference is the policy with its adapter off."""

import json
import os
import sys
import tempfile
from typing import Any

from benchmarks.rl_task import DIRECTORY, LINEARS, read, reward
from benchmarks.rl_turns import MISSING, Turns

try:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (on nobody's bill)
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    from benchmarks.rl_callback import InTurns
except ModuleNotFoundError:
    sys.exit(MISSING)


def main(gradient_checkpointing: bool = False) -> None:
    turns, directory = Turns(), os.environ[DIRECTORY]
    task = read(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})  # that no model gives: outside its head
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, task.dtype))
    micro_batches = task.samples // task.micro_batch
    config = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # no autocast: the model is of the task's dtype
        gradient_checkpointing=gradient_checkpointing,
        max_steps=task.steps * task.epochs,
        per_device_train_batch_size=task.micro_batch,
        gradient_accumulation_steps=micro_batches // task.mini_batches,
        steps_per_generation=micro_batches,
        num_iterations=task.epochs,
        num_generations=task.generations,
        max_completion_length=task.new_tokens,
        temperature=1.0,
        beta=task.kl_coef,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_epsilon=task.adam_epsilon,
        weight_decay=0.0,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    taker = InTurns(turns, updates=task.epochs * task.mini_batches)

    def noted(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        found = reward(prompts, completions)
        taker.reward = sum(found) / len(found)
        return [*found]

    trainer = RLOOTrainer(
        model=model,
        reward_funcs=noted,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": task.texts()}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=task.rank,
            lora_alpha=int(task.alpha),
            lora_dropout=0.0,
            target_modules=list(LINEARS),
            task_type="CAUSAL_LM",
        ),
        callbacks=[taker],
    )
    trainer.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
