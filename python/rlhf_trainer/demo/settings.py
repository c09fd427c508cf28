"""What the demo is run with: one table of tuned settings an algorithm, and the configurations made from it.

The tiny model wants learning rates a thousand times those of a 7B model; the rest is as each algorithm's row has it.
"""

from pathlib import Path
from typing import Any

from rlhf_trainer.config import TrainConfig
from rlhf_trainer.demo import data_path
from rlhf_trainer.names import ONLINE, SUPERVISED

MAX_COMPLETION = 40  # tokens; 8 of 100 sentences of the checkpoint are longer
EVAL_PROMPTS = 256

HYDRA_SFT: dict[str, Any] = {
    "total_steps": 500,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "reward_loss_coef": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
}

REWARD_ADAPTER: dict[str, Any] = {
    "total_steps": 200,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
}

COMMON: dict[str, Any] = {
    "total_steps": 70,
    "rollout_batch_size": 64,
    "per_device_train_batch_size": 64,
    "num_ppo_epochs": 2,
    "kl_coef": 0.4,
    "vf_coef": 0.5,
    "cliprange_value": 1.0,
    "missing_eos_penalty": 3.0,  # in the reward head's units, of which a sample's standard deviation is about 1.5
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "kv_memory": "16MiB",
}
ADAPTERS: dict[str, Any] = {"lora_r": 16, "lora_alpha": 32.0, "learning_rate": 1e-3}

PAIRS: dict[str, Any] = {
    "total_steps": 120,
    "per_device_train_batch_size": 32,
    "max_completion_length": 128,  # nothing is cut, as in HYDRA_SFT
    "warmup_steps": 10,
    "lr_scheduler_type": "linear",
    "kv_memory": "16MiB",
    "reward": ["rlhf_trainer.demo.gold:reward"],  # of the held-out prompts: pairs alone are learned from
}

# algorithm -> what differs from COMMON, or from PAIRS where it learns from preference pairs
TUNED: dict[str, dict[str, Any]] = {
    "hydra-ppo": ADAPTERS,
    # one adapter serves both losses: the value loss must not drown the policy's
    "j-hydra-ppo": ADAPTERS | {"vf_coef": 0.05, "kl_coef": 0.43, "total_steps": 75},
    "lora-ppo": ADAPTERS,
    "ppo": {"learning_rate": 3e-4, "kl_coef": 0.5, "total_steps": 60},
    # rewards of unit variance: the other penalties are in that unit too
    "ppo-max": {
        "learning_rate": 3e-4,
        "kl_coef": 0.2,
        "missing_eos_penalty": 2.0,
        "critic_warmup_steps": 5,
        "total_steps": 75,
    },
    # no ratio, so one pass; one adapter serves policy and baseline
    "pe-rlhf": ADAPTERS
    | {"learning_rate": 1.75e-3, "num_ppo_epochs": 1, "kl_coef": 0.38, "vf_coef": 0.05, "total_steps": 80},
    "remax": {"learning_rate": 5e-4, "num_ppo_epochs": 1, "kl_coef": 0.45, "total_steps": 80},
    "reinforce": {"learning_rate": 5e-4, "num_ppo_epochs": 1, "kl_coef": 0.45, "total_steps": 65},
    # a prompt's samples share its prefill: fewer prompts, several samples each
    "rloo": {
        "learning_rate": 5e-4,
        "num_ppo_epochs": 1,
        "kl_coef": 0.5,
        "rollout_batch_size": 24,
        "num_generations": 4,
        "total_steps": 50,
    },
    # ranked by the reward less the KL: longer texts, and those that repeat, pay for it
    "raft": {
        "learning_rate": 3e-4,
        "num_ppo_epochs": 1,
        "kl_coef": 0.4,
        "rollout_batch_size": 24,
        "num_generations": 5,
        "total_steps": 90,
    },
    "superhf": ADAPTERS
    | {
        "num_ppo_epochs": 1,
        "kl_coef": 0.32,
        "rollout_batch_size": 8,
        "num_generations": 16,
        "total_steps": 74,
    },
    # pairs of the best and the worst sample; a goal of 2.9 nats a pair, for sentences of 17 tokens
    "inpo": ADAPTERS
    | {
        "learning_rate": 2e-3,
        "eta": 0.17,
        "num_ppo_epochs": 4,
        "rollout_batch_size": 16,
        "num_generations": 8,
        "total_steps": 50,
    },
    "dpo": ADAPTERS,
    "r-dpo": ADAPTERS,
}
assert set(TUNED) == {*ONLINE, "dpo", "r-dpo"}


def hydra_sft(output_dir: Path, seed: int = 0, **changes: Any) -> TrainConfig:
    """The configuration that trains the reward head, and with it the base, on the preference pairs."""
    values: dict[str, Any] = {
        "algorithm": "hydra-sft",
        "model": "demo",
        "prompts": data_path("preferences"),
        "max_completion_length": 128,  # nothing is cut: a cut text has no end token to read
        "output_dir": str(output_dir),
        "seed": seed,
        "save_steps": 0,
        "report": False,
    }
    return TrainConfig(**(values | HYDRA_SFT | changes))


def least_rise(algorithm: str) -> float:
    """What the demo's gold score must gain, in standard deviations; pairs from a file teach less than samples."""
    return 0.5 if algorithm in SUPERVISED else 1.0


def policy(algorithm: str, base: Path, output_dir: Path, seed: int = 0, **changes: Any) -> TrainConfig:
    """The configuration of one run of a TUNED algorithm from the Hydra-SFT model in `base`."""
    if algorithm in ONLINE:
        return online(algorithm, base, output_dir, seed, **changes)
    values: dict[str, Any] = {
        "algorithm": algorithm,
        "model": str(base),
        "prompts": data_path("preferences"),
        "eval_prompts": data_path("eval_prompts"),
        "output_dir": str(output_dir),
        "seed": seed,
        "save_steps": 0,
    }
    return TrainConfig(**(values | PAIRS | TUNED[algorithm] | changes))


def reward_adapter(base: Path, seed: int = 0, **changes: Any) -> TrainConfig:
    """The configuration that trains pe-rlhf's reward model: an adapter on the Hydra-SFT model in `base`."""
    values: dict[str, Any] = {
        "algorithm": "reward",
        "model": str(base),
        "prompts": data_path("preferences"),
        "max_completion_length": 128,
        "output_dir": str(base / "reward-adapter"),
        "seed": seed,
        "save_steps": 0,
        "report": False,
    }
    return TrainConfig(**(values | REWARD_ADAPTER | changes))


def online(algorithm: str, base: Path, output_dir: Path, seed: int = 0, **changes: Any) -> TrainConfig:
    """The configuration of one run from the Hydra-SFT model in `base`."""
    values: dict[str, Any] = {
        "algorithm": algorithm,
        "model": str(base),
        "prompts": data_path("prompts"),
        "eval_prompts": data_path("eval_prompts"),
        "max_completion_length": MAX_COMPLETION,
        "output_dir": str(output_dir),
        "seed": seed,
        "save_steps": 0,
    }
    if algorithm == "pe-rlhf":
        values["reward_model"] = str(base / "reward-adapter")
    return TrainConfig(**(values | COMMON | TUNED[algorithm] | changes))
