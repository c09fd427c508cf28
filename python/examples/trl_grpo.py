"""TRL's GRPO with LoRA on the demo's model: TRL's trainer as it is, on the fused head and the fused adapters."""

import json
import tempfile

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from rlhf_kernels.integrations.trl import patch, patched
from rlhf_trainer.demo import checkpoint_path, data_path

with open(data_path("prompts")) as file:
    prompts = Dataset.from_list([json.loads(line) for line in file][:64])


def vowels(completions: list[str], **columns: object) -> list[float]:
    """The share of vowels in a completion."""
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in completions]


with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder,
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=16,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=checkpoint_path(),
        reward_funcs=vowels,
        args=config,
        train_dataset=prompts,
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    patch(trainer)
    trainer.train()

print(patched(trainer))
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print("reward", *(f"{reward:.3f}" for reward in rewards))
