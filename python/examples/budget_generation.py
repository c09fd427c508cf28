"""Rollouts inside a number of bytes: keys and values never exceed it, and what comes out does not depend on it.

python budget_generation.py [MODEL] [--kv-memory 32MiB 2MiB 512KiB]
MODEL: any causal decoder in transformers' format; default: the one that comes with the package.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_trainer.demo import checkpoint_path

PROMPTS = ["Return the file", "The encoding of", "Lines that begin with", "If the optional argument is"]


def main(argv: list[str] | None = None) -> list[list[list[int]]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=checkpoint_path())
    parser.add_argument("--kv-memory", nargs="+", default=["32MiB", "2MiB", "512KiB"])
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]

    # Eight samples and the greedy completion of each prompt; they share the prompt's keys and values.
    params = SamplingParams(max_new_tokens=48, temperature=0.9, top_p=0.95, n=8, greedy_baseline=True, seed=1)
    made = []
    for budget in args.kv_memory:
        generator = SlicedGenerator(model, kv_memory=budget)
        rollouts = generator.generate(prompts, params)
        made.append([rollout.tokens for rollout in rollouts])
        stats = generator.stats
        print(
            f"{budget:>7}: {stats.peak_kv_bytes / 2**20:5.2f} MiB leased at most, {stats.mean_active:4.1f} sequences a "
            f"step, {stats.preemptions:3d} preemptions, {stats.tokens_per_second:6.0f} tokens/s, "
            f"{'the same' if made[-1] == made[0] else 'other'} rollouts"
        )
        generator.sleep()  # an update can have those bytes

    for rollout in rollouts:
        if rollout.greedy:
            print(f"{PROMPTS[rollout.prompt_index]} ...{tokenizer.decode(rollout.tokens, skip_special_tokens=True)}")
    return made


if __name__ == "__main__":
    main()
