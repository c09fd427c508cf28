"""A tiny random model on disk with a tokenizer made on the spot, and data for it: what the trainer's tests run on."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf_trainer import TrainConfig
from rlhf_trainer.names import ONLINE

WORDS = [
    f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ro", "su", "ta") for b in ("ban", "dor", "fel", "gim", "hul")
]


def tokenizer() -> Any:
    """Whole words, split at spaces; 43 entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def checkpoint(directory: Path, seed: int = 0, reward_head: bool = True, sharpness: float = 0.3) -> str:
    """A random Llama (2 layers of 32) in transformers' format; `sharpness` is the spread of its initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS) + 3,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=sharpness,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    if reward_head:
        save_file({"reward.weight": torch.randn(1, 32) * 0.3}, directory / "heads.safetensors")
    return str(directory)


def reward_adapter(directory: Path, model: str, rank: int = 4, seed: int = 2) -> str:
    """What a `reward` run with `lora_r` leaves: a reward adapter for `model` and its head, both of random values."""
    from rlhf_kernels.nn import HydraModel, LoraSpec, Role

    adapters, roles = {"reward": LoraSpec(rank, 2.0 * rank)}, {"reward": Role("reward", "reward")}
    made = HydraModel.from_pretrained(model, adapters, roles, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.trainable_parameters("reward"):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(directory)
    return str(directory)


def prompts(path: Path, count: int = 12) -> str:
    """JSONL prompts of 2 to 6 words."""
    rows = [{"prompt": " ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(2 + i % 5))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def preferences(path: Path, count: int = 12) -> str:
    """JSONL rows with prompt, chosen and rejected; `completion` equals chosen, so that they are demonstrations too."""
    rows = []
    for i in range(count):
        words = [WORDS[(11 * i + 3 * j) % len(WORDS)] for j in range(12)]
        chosen, rejected = " ".join(words[3 : 6 + i % 4]), " ".join(words[6 : 8 + i % 3])
        rows.append({"prompt": " ".join(words[:3]), "chosen": chosen, "rejected": rejected, "completion": chosen})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(directory: Path, algorithm: str = "hydra-ppo", **changes: Any) -> TrainConfig:
    """A run of a few seconds on the tiny model; files are made in `directory` when they are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    model, online = directory / "model", algorithm in ONLINE
    if not model.exists():
        checkpoint(model)
    data = directory / ("prompts.jsonl" if online else "preferences.jsonl")
    if not data.exists():
        (prompts if online else preferences)(data)
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "model": str(model),
        "prompts": str(data),
        "output_dir": str(directory / "out"),
        "total_steps": 2,
        "rollout_batch_size": 6,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "kv_memory": "1MiB",
        "slice_tokens": 4,
        "report": False,
    }
    if algorithm in ("hydra-ppo", "j-hydra-ppo", "lora-ppo", "pe-rlhf"):
        settings |= {"lora_r": 4, "lora_alpha": 8.0}
    if algorithm == "pe-rlhf" and not changes.keys() & {"reward", "reward_model"}:
        adapter = directory / "reward_adapter"
        settings["reward_model"] = str(adapter) if adapter.exists() else reward_adapter(adapter, str(model))
    return TrainConfig(**(settings | changes))
