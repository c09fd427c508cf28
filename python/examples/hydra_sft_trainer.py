"""Supervised fine-tuning of a HydraModel's actor adapter by transformers.Trainer: it trains, saves and resumes."""

import tempfile

from transformers import AutoTokenizer, Trainer, TrainingArguments

from rlhf_kernels.integrations.transformers_trainer import HydraSFT, packed_rows
from rlhf_kernels.nn import HydraModel, LoraSpec
from rlhf_trainer.demo import checkpoint_path

tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
rows = []
for prompt, answer in (("The function returns", " a list."), ("If the file", " is missing, it is made.")) * 8:
    ids = tokenizer(prompt).input_ids
    rows.append({"input_ids": ids + tokenizer(answer).input_ids, "prompt_length": len(ids)})


def trainer(output_dir: str, **options: object) -> Trainer:
    model = HydraModel.from_pretrained(checkpoint_path(), {"actor": LoraSpec(r=8, alpha=16)}, dtype=None)
    arguments = TrainingArguments(
        output_dir, learning_rate=1e-2, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6,
        save_steps=3, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        **options,
    )  # fmt: skip
    return Trainer(HydraSFT(model), arguments, data_collator=packed_rows, train_dataset=rows)


with tempfile.TemporaryDirectory() as directory:
    run = trainer(directory)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    again = trainer(directory)
    again.train(resume_from_checkpoint=f"{directory}/checkpoint-3")
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    run.model.model.save_pretrained(f"{directory}/result")  # PEFT's layout: directory/result/actor
print("losses ", losses)
print("resumed", resumed)
assert losses[-1] < losses[0]
assert resumed == losses
