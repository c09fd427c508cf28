"""Everything a run can be told, in one dataclass: a YAML file fills it, flags override it, `config.yaml` beside the results records it.

Names are those that users of other trainers know. A value of None means "the algorithm's own default" (its row in
`rlhf_trainer.algorithms` fills it); units are tokens, steps or bytes as the comments say.
"""

from dataclasses import dataclass, field

ALGORITHMS = ("sft", "reward", "hydra-sft", "ppo", "lora-ppo", "j-hydra-ppo", "hydra-ppo", "remax")
KL_ESTIMATORS = (
    "kl",
    "clamped_kl",
    "squared_error",
    "bregman",
    "jensen_shannon",
    "full_kl",
    "full_js",
    "none",
)


@dataclass
class TrainConfig:
    algorithm: str = "hydra-ppo"

    # what is trained, on what, and what says it is good
    model: str = "demo"  # a directory in transformers' format, a hub id, or "demo": the embedded checkpoint
    reward_model: str | None = (
        None  # checkpoint with a reward head for `ppo` and `lora-ppo`; None: the model's own head
    )
    prompts: str | None = None  # JSONL file or `datasets` name; None only with the demo model
    eval_prompts: str | None = None
    prompt_column: str = "prompt"
    reward: list[str] = field(
        default_factory=list
    )  # pkg.mod:function or a sequence classifier's path; empty: the reward head
    reward_weights: list[float] = field(default_factory=list)
    output_dir: str = "output"
    resume: bool = False
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    # adapters
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_target_modules: str = "all-linear"  # or a comma-separated list of module names

    # how long, how much at once
    total_steps: int = 100  # optimisation phases: one rollout each for the online algorithms, one batch for the others
    rollout_batch_size: int = 64  # prompts a rollout
    per_device_train_batch_size: int = 16  # sequences a micro-batch
    num_mini_batches: int = 1  # optimiser steps an epoch over one rollout
    gradient_accumulation_steps: int = 1  # sft and reward: micro-batches an optimiser step
    num_ppo_epochs: int | None = None
    learning_rate: float | None = None
    critic_learning_rate: float | None = None
    lr_scheduler_type: str = "constant"  # constant | linear | cosine
    warmup_steps: int = 0
    weight_decay: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float | None = None
    adam_epsilon: float = 1e-5
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False

    # generation
    max_prompt_length: int = 512
    max_completion_length: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_generations: int = 1
    kv_memory: str = "512MiB"
    slice_tokens: int = 16
    max_active: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)

    # reward shaping
    kl_coef: float | None = None
    kl_estimator: str = "kl"  # one of KL_ESTIMATORS
    kl_controller: str = "fixed"  # fixed | adaptive
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    kl_mode: str = "cumulative"  # remax: cumulative | one-step
    loss: str = "sequence"  # remax: sequence | token-mean
    missing_eos_penalty: float | None = None
    reward_clip: float | None = None
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float | None = None
    reward_loss_coef: float = 0.1  # hydra-sft: gamma of CE + gamma * preference loss

    # what is kept and shown
    logging_steps: int = 1
    save_steps: int = 50
    save_total_limit: int = 2
    eval_steps: int = 0  # 0: only at the end
    num_sample_completions: int = 8
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, trackio: accelerate's trackers
    report: bool = True
