"""What pages take for granted: checkpoints, made from the demo's or from a random seed, and files of a few rows."""

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_trainer.demo import checkpoint_path, data_path


def demo_model(*directories: str, reward_head: bool = True) -> None:
    """The embedded checkpoint under each of these paths, with a random reward head as a `hydra-sft` run leaves one."""
    import torch
    from safetensors.torch import save_file

    for directory in map(Path, directories):
        directory.mkdir(parents=True)
        for file in Path(checkpoint_path()).iterdir():
            if file.suffix != ".jsonl":
                shutil.copy(file, directory)
        if reward_head:
            torch.manual_seed(0)
            save_file({"reward.weight": 0.1 * torch.randn(1, 128)}, directory / "heads.safetensors")


def demo_rows(which: str, file: str, count: int = 12) -> list[dict[str, Any]]:
    """The first rows of the demo's prompts, preferences or demonstrations, in a JSONL file of this name too."""
    with open(data_path(which)) as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count))]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def llama_2_7b(directory: str) -> None:
    """Its config.json: all that a memory plan reads."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, vocab_size=32000, max_position_embeddings=4096,
    ).save_pretrained(directory)  # fmt: skip


def reward_module(name: str, function: str) -> None:
    """`name.py` with a reward of that name: more words are better."""
    Path(f"{name}.py").write_text(
        f"def {function}(prompts, completions, **columns):\n    return [float(len(c.split())) for c in completions]\n"
    )
