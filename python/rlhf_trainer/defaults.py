"""What each algorithm makes of the options: its own values for those left at None, and which of them it reads at all.

The rows of `rlhf_trainer.algorithms` take their defaults from here; nothing here imports torch, so that `--help` shows
an algorithm its own values and only the options that mean something to it.
"""

from collections.abc import Collection, Mapping
from typing import Any

from .names import ALGORITHMS, ONLINE, SUPERVISED

MICRO_BATCH, KV_MEMORY = 16, "512MiB"
SIZES: dict[str, Any] = {"per_device_train_batch_size": MICRO_BATCH, "kv_memory": KV_MEMORY}  # without a memory_budget

UNSAID: dict[str, Any] = {"num_generations": 1, "critic_warmup_steps": 0}  # where a row does not say else

_SHARED: dict[str, Any] = {"weight_decay": 0.0, "adam_beta2": 0.999, "num_ppo_epochs": 1}
_WHOLE: dict[str, Any] = {"lora_r": 0, "lora_alpha": 32.0}
_RANK: dict[str, Any] = {"lora_r": 128, "lora_alpha": 128.0}

_OFFLINE = _SHARED | _WHOLE | {"kl_coef": 0.0, "vf_coef": 0.0}
_ONLINE = _SHARED | _WHOLE | {"learning_rate": 1e-6, "kl_coef": 0.03, "vf_coef": 0.0}  # of rows without a critic
_PPO = _SHARED | {"learning_rate": 5e-6, "num_ppo_epochs": 4, "kl_coef": 0.02, "vf_coef": 0.1}
_PREFERENCE = _OFFLINE | _RANK | {"learning_rate": 5e-6}

DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": _OFFLINE | {"learning_rate": 2e-5},
    "reward": _OFFLINE | {"learning_rate": 1e-5},
    "hydra-sft": _OFFLINE | {"learning_rate": 1e-5},
    "dpo": _PREFERENCE,
    "r-dpo": _PREFERENCE,
    "ppo": _PPO | _WHOLE,
    "lora-ppo": _PPO | _RANK,
    "j-hydra-ppo": _PPO | _RANK,
    "hydra-ppo": _PPO | _RANK,
    "ppo-max": _ONLINE
    | {
        "learning_rate": 5e-7,
        "critic_warmup_steps": 10,
        "kl_coef": 0.05,
        "vf_coef": 1.0,
        "reward_clip": 5.0,
        "advantage_clip": 0.5,
        "adam_beta2": 0.95,
    },
    "pe-rlhf": _ONLINE | {"learning_rate": 1e-5, "kl_coef": 0.05, "vf_coef": 0.1, "lora_r": 16, "lora_alpha": 16.0},
    "remax": _ONLINE | {"kl_coef": 0.1, "weight_decay": 0.1, "adam_beta2": 0.95},
    "reinforce": _ONLINE,
    "rloo": _ONLINE | {"num_generations": 4},
    "raft": _ONLINE | {"learning_rate": 2e-5, "kl_coef": 0.0, "num_generations": 5},
    "superhf": _ONLINE | {"learning_rate": 2e-5, "kl_coef": 0.35, "num_generations": 16, "lora_r": 4},
    "inpo": _ONLINE | _RANK | {"learning_rate": 5e-6, "num_generations": 8, "kl_coef": 0.0},
}

REWARD_MODEL = ("ppo", "lora-ppo", "ppo-max", "pe-rlhf", "remax")  # with a checkpoint of its own for the reward
PPO = ("ppo", "lora-ppo", "j-hydra-ppo", "hydra-ppo", "ppo-max")
CRITIC = (*PPO, "pe-rlhf")
PENALISED = tuple(name for name in ONLINE if name not in ("superhf", "inpo"))  # these hold the policy by their loss
GENERATING = tuple(name for name in ALGORITHMS if name != "reward")  # at least for evaluations
_READ_BY: tuple[tuple[str, Collection[str]], ...] = (  # options, and the algorithms that read them; the others all do
    ("demonstrations ptx_coef rollout_batch_size num_mini_batches num_ppo_epochs num_generations", ONLINE),
    ("missing_eos_penalty reward_clip", ONLINE),
    ("gradient_accumulation_steps", SUPERVISED),
    ("reward_model", REWARD_MODEL),
    ("eval_prompts reward reward_weights reward_batch_size eval_steps num_sample_completions", GENERATING),
    ("temperature top_k top_p min_p kv_memory slice_tokens max_active stop_token_ids", GENERATING),
    ("critic_warmup_steps critic_learning_rate vf_coef gamma", CRITIC),
    ("whiten_rewards whiten_advantages advantage_clip lam cliprange cliprange_value", PPO),
    ("kl_coef", (*PENALISED, "superhf")),
    ("kl_estimator kl_controller kl_target kl_horizon", PENALISED),
    ("kl_mode", ("remax",)),
    ("loss", ("remax", "reinforce", "rloo", "pe-rlhf")),
    ("baseline_decay", ("reinforce",)),
    ("beta label_smoothing precompute_ref_logprobs", ("dpo", "r-dpo")),
    ("length_coef", ("r-dpo",)),
    ("eta tau_ratio rounds", ("inpo",)),
    ("reward_loss_coef", ("hydra-sft",)),
)
READ_BY: Mapping[str, Collection[str]] = {name: readers for names, readers in _READ_BY for name in names.split()}


def applies(option: str, algorithm: str) -> bool:
    """Whether `algorithm` reads an option of TrainConfig at all."""
    return algorithm in READ_BY.get(option, ALGORITHMS)


def own_defaults(algorithm: str) -> dict[str, Any]:
    """What None means to `algorithm`, by option; options that stay None are left out."""
    return UNSAID | SIZES | DEFAULTS[algorithm]
