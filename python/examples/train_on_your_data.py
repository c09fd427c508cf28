"""Hydra-PPO on data of your own: a JSONL file of prompts, a reward function, a model; the trainer does the rest.

python train_on_your_data.py [--model demo] [--steps 4] [--output runs/mine]
The same from a shell: rlhf-train hydra-ppo --model demo --prompts prompts.jsonl --reward train_on_your_data:reward
"""

import argparse
import json
from pathlib import Path

from rlhf_trainer import TrainConfig, train

# A row's other columns reach the reward function under their names.
ROWS = [
    {"prompt": "Return the", "wanted": "file"},
    {"prompt": "The name of", "wanted": "module"},
    {"prompt": "This method", "wanted": "object"},
    {"prompt": "If the argument", "wanted": "string"},
]


def reward(prompts: list[str], completions: list[str], wanted: list[str], **columns: list) -> list[float]:
    """One number a completion, higher is better: has it the wanted word, and is it short?"""
    return [(word in text) - len(text.split()) / 20 for text, word in zip(completions, wanted)]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="directory in transformers' format; demo: the embedded one")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("runs/mine"))
    args = parser.parse_args(argv)

    args.output.mkdir(parents=True, exist_ok=True)
    prompts = args.output / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = TrainConfig(
        algorithm="hydra-ppo",
        model=args.model,
        prompts=str(prompts),
        reward=["train_on_your_data:reward"],  # module:function
        output_dir=str(args.output / "run"),
        total_steps=args.steps,
        rollout_batch_size=32,
        max_completion_length=24,
        lora_r=16,
        learning_rate=1e-3,  # a 0.9M-parameter model's; 5e-6 is the default
        kl_coef=0.05,
        kv_memory="16MiB",
        report=False,
    )
    result = train(config)
    scores = [step["objective/scores"] for step in result.history]
    print("mean reward by step:", ", ".join(f"{score:.2f}" for score in scores))
    print(f"adapters in PEFT's layout, metrics.jsonl and samples.jsonl are in {result.output_dir}")
    return scores


if __name__ == "__main__":
    main()
