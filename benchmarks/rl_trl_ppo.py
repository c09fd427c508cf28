"""TRL's PPO, of the last version that has it: the process that takes its steps, in an environment of its own.

Policy and critic are two models with adapters of the task's rank on the same modules; the reference is the policy with
its adapter off. TRL asks a module for the reward: `TokenReward` looks the tokens' worth up.
"""

import json
import os
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from benchmarks.rl_task import DIRECTORY, LINEARS, Task, read, token_scores
from benchmarks.rl_turns import MISSING, Turns

try:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (on nobody's bill)
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model
    from torch import Tensor, nn
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from benchmarks.rl_callback import InTurns
except ModuleNotFoundError:
    sys.exit(MISSING)


class TokenReward(nn.Module):
    """What TRL expects of a reward model: a backbone by the name of `base_model_prefix`, and `score` of its states."""

    base_model_prefix = "backbone"
    worth: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.register_buffer("worth", torch.tensor(token_scores()))
        self.prompt_tokens = task.prompt_tokens

    def backbone(self, input_ids: Tensor, **_: Any) -> Any:
        sums = self.worth[input_ids]
        sums[:, : self.prompt_tokens] = 0
        return SimpleNamespace(hidden_states=[sums.cumsum(1).unsqueeze(-1)])

    def score(self, hidden: Tensor) -> Tensor:
        return hidden


def models(task: Task, directory: str) -> tuple[nn.Module, nn.Module]:
    """Policy and critic. A critic starts at zero, as ours does, and has fp32 adapters, as PEFT gives the policy."""
    dtype = getattr(torch, task.dtype)
    lora = LoraConfig(r=task.rank, lora_alpha=int(task.alpha), lora_dropout=0.0, target_modules=list(LINEARS))
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), lora)
    critic = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype, num_labels=1)
    critic.requires_grad_(False)
    inject_adapter_in_model(lora, critic.model)
    for name, parameter in critic.named_parameters():
        if "lora_" in name or name.startswith("score."):
            parameter.requires_grad_(True)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    nn.init.zeros_(critic.score.weight)
    return policy, critic


def main(rows: int, gradient_checkpointing: bool = False) -> None:
    """rows: how many are generated and scored at a time."""
    turns, directory = Turns(), os.environ[DIRECTORY]
    task = read(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})  # that no model gives: outside its head
    policy, critic = models(task, directory)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,  # no autocast: the models are of the task's dtype
        gradient_checkpointing=gradient_checkpointing,
        total_episodes=task.steps * task.samples,
        per_device_train_batch_size=task.samples,  # of a rollout; its minibatches are the micro-batches
        num_mini_batches=task.mini_batches,
        num_ppo_epochs=task.epochs,
        local_rollout_forward_batch_size=rows,
        num_sample_generations=0,
        response_length=task.new_tokens,
        temperature=1.0,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_epsilon=task.adam_epsilon,
        weight_decay=0.0,
        kl_coef=task.kl_coef,
        vf_coef=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    prompts = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in task.texts()]})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=TokenReward(task),
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(1)),
        callbacks=[InTurns(turns, metric="objective/scores")],
    )
    trainer.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
