"""The process in which one of TRL's trainers takes its steps for `python -m benchmarks trl`."""

import json
import os
import random
import sys
import tempfile
import time
from typing import Any

from benchmarks.rl_task import DIRECTORY, LINEARS, Task, read, reward
from benchmarks.rl_turns import MISSING, Turns

try:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (on nobody's bill, as the rest of these)
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, Trainer, TrainerCallback

    import rlhf_kernels.integrations.peft_layers
    import rlhf_kernels.integrations.trl_kernel  # noqa: F401
    from rlhf_kernels.integrations.trl import patch
except ModuleNotFoundError:
    sys.exit(MISSING)

TRAINERS = {
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
}


class Steps(TrainerCallback):
    """Takes a step when told to, and says what its loss was and how long it sampled."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.loss, self.sampling_s = turns, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.turns.done(self.loss, self.sampling_s)
        self.sampling_s = 0.0
        self.turns.wait()

    def watch(self, trainer: Any) -> None:
        """Notes what the trainer's own methods return and take."""
        compute_loss = trainer.compute_loss
        generate: Any = getattr(trainer, "_generate", None)

        def noted(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            self.loss = float(loss.detach())
            return loss

        trainer.compute_loss = noted
        if generate is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return generate(*args, **kwargs)
            finally:
                self.sampling_s += time.process_time() - started

        trainer._generate = timed


def data(kind: str, task: Task) -> Dataset:
    draw = random.Random(1)

    def completions() -> list[str]:
        return [
            "".join(f" t{draw.randrange(2, task.vocabulary)}" for _ in range(task.new_tokens - 1))
            for _ in range(task.prompts)
        ]

    columns = {"prompt": task.texts()}
    if kind == "sft":
        columns |= {"completion": completions()}
    if kind == "dpo":
        columns |= {"chosen": completions(), "rejected": completions()}
    return Dataset.from_dict(columns)


def build(kind: str, lora: bool, task: Task, directory: str) -> Trainer:
    kind_of, config = TRAINERS[kind]
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", pad_token="t0", eos_token="t1")
    sampled = kind in ("grpo", "rloo")
    own: dict[str, Any] = {"max_length": None}
    if sampled:
        own = {"num_generations": task.generations, "max_completion_length": task.new_tokens, "beta": task.kl_coef}
    adapter = LoraConfig(
        r=task.rank, lora_alpha=int(task.alpha), lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM"
    )
    return kind_of(
        model=directory,
        args=config(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,  # no autocast: the model is of the task's dtype
            model_init_kwargs={"dtype": task.dtype},
            max_steps=task.steps,
            per_device_train_batch_size=task.micro_batch // 2 if kind == "dpo" else task.micro_batch,
            learning_rate=task.learning_rate if lora else task.learning_rate / 10,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **own,
        ),
        train_dataset=data(kind, task),
        processing_class=tokenizer,
        peft_config=adapter if lora else None,
        **({"reward_funcs": reward} if sampled else {}),
    )


def main(kind: str, lora: bool, patched: bool) -> None:
    turns, directory = Turns(), os.environ[DIRECTORY]
    torch.manual_seed(0)
    steps = Steps(turns)
    trainer = build(kind, lora, read(directory), directory)
    trainer.add_callback(steps)
    if patched:
        patch(trainer)
    steps.watch(trainer)
    trainer.train()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
