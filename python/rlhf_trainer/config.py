"""Everything a run can be told, in one dataclass: a YAML file fills it, flags override it, `config.yaml` records it.

Names are those that users of other trainers know. A value of None means "the algorithm's own default" (its row in
`rlhf_trainer.algorithms` fills it); units are tokens, steps or bytes as the help texts say.
"""
# ruff: noqa: RUF009  (option() makes a dataclass field, as field() does)

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from .defaults import KV_MEMORY, MICRO_BATCH, REWARD_MODEL
from .errors import UserError, one_line
from .names import ALGORITHMS, ONLINE
from .options import build_parser, check_ranges, option, typed

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
ROLLOUTS = ("whole", "steps")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")

GROUPS = {  # a section's first field: its title in --help
    "algorithm": "what is trained, on what, and what says it is good",
    "lora_r": "adapters",
    "total_steps": "how long, how much at once",
    "max_prompt_length": "generation",
    "kl_coef": "reward shaping",
    "logging_steps": "what is kept and shown",
}


@dataclass
class TrainConfig:
    """A run. Build it from keywords, `from_dict` or `from_yaml`; `validate` says in one line what is wrong with it."""

    algorithm: str = option("hydra-ppo", "what to run", choices=ALGORITHMS)
    model: str = option("demo", "directory in transformers' format, hub id, or demo: the embedded checkpoint")
    reward_model: str | None = option(
        None, f"for {', '.join(REWARD_MODEL)}: checkpoint with a reward head; default: the model's own"
    )
    prompts: str | None = option(None, "JSONL file or `datasets` name; may be left out with the demo model only")
    eval_prompts: str | None = option(None, "held-out prompts, same format")
    demonstrations: str | None = option(
        None, "online algorithms: rows whose cross-entropy is added to every update, as sft's prompts"
    )
    ptx_coef: float = option(1.0, "its weight", least=0)
    prompt_column: str = option("prompt", "name of the prompt's column")
    reward: list[str] = option(
        [],
        "pkg.mod:function or a sequence classifier's path; several add up; none: the reward head (demo: gold score)",
    )
    reward_weights: list[float] = option([], "one weight for each --reward; default: all 1")
    output_dir: str = option("output", "where metrics, checkpoints and the report go")
    resume: bool = option(False, "go on from the last checkpoint in output_dir")
    seed: int = option(0, "seed of every random draw", least=0)
    dtype: str = option("float32", "of the model's weights", choices=("float32", "bfloat16"))
    device: str = option("cpu", "cpu, cuda or cuda:N")
    fsdp: bool = option(False, "several processes: the bases' weights in shards over them (FSDP2)")
    fsdp_rollouts: str = option(
        "whole", "sampling with fsdp: the policy's base gathered once, or layer by layer each step", choices=ROLLOUTS
    )

    # adapters
    lora_r: int | None = option(None, "rank; 0: no adapters, the whole base is trained", least=0)
    lora_alpha: float | None = option(None, "scaling is alpha / r", above=0)
    lora_target_modules: str = option("all-linear", "all-linear (of the decoder layers) or names separated by commas")

    # how long, how much at once
    total_steps: int = option(100, "online algorithms: rollouts; the others: optimiser steps", least=1)
    rollout_batch_size: int = option(64, "prompts a rollout", least=1)
    per_device_train_batch_size: int | None = option(
        None, f"sequences a micro-batch; default: {MICRO_BATCH}, or the most that memory_budget holds", least=1
    )
    num_mini_batches: int = option(1, "optimiser steps an epoch over one rollout", least=1)
    gradient_accumulation_steps: int = option(1, "sft and reward: micro-batches an optimiser step", least=1)
    num_ppo_epochs: int | None = option(None, "passes over one rollout", least=1)
    critic_warmup_steps: int | None = option(None, "first steps in which only the critic is updated", least=0)
    learning_rate: float | None = option(None, "peak learning rate", above=0)
    critic_learning_rate: float | None = option(None, "default: learning_rate", above=0)
    lr_scheduler_type: str = option("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float | None = option(None, "AdamW's", least=0)
    adam_beta1: float = option(0.9, "AdamW's", least=0, most=0.99999)
    adam_beta2: float | None = option(None, "AdamW's", least=0, most=0.99999)
    adam_epsilon: float = option(1e-5, "AdamW's", above=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    memory_budget: str | int | None = option(
        None, "bytes for all, such as 16GiB: the memory plan then sets the micro-batch and kv_memory where they are not"
    )

    # generation
    max_prompt_length: int = option(512, "tokens", least=1)
    prompt_truncation: str = option(
        "left", "a longer prompt is cut on the left, dropped, or an error", choices=("left", "drop", "error")
    )
    max_completion_length: int = option(128, "tokens", least=1)
    temperature: float = option(1.0, "of sampling and of the trained policy", above=0)
    top_k: int = option(0, "0: off", least=0)
    top_p: float = option(1.0, "1: off", above=0, most=1)
    min_p: float = option(0.0, "0: off", least=0, most=1)
    num_generations: int | None = option(None, "samples a prompt", least=1)
    kv_memory: str | int | None = option(
        None,
        f"bytes of the KV arena, such as 2GiB; default: {KV_MEMORY}, or what memory_budget leaves of the rollout's",
    )
    slice_tokens: int = option(16, "tokens a KV slice", least=1)
    max_active: int | None = option(None, "most sequences decoded at once; default: as many as fit", least=1)
    stop_token_ids: list[int] = option([], "end a completion as end-of-sequence does", least=0)

    # reward shaping
    reward_batch_size: int | None = option(
        None, "prompts a call of the rewards, made as soon as they are completed; default: all in one", least=1
    )
    kl_coef: float | None = option(None, "weight of the divergence from the reference", least=0)
    kl_estimator: str = option("kl", "the per-token divergence", choices=KL_ESTIMATORS)
    kl_controller: str = option("fixed", "of kl_coef", choices=("fixed", "adaptive"))
    kl_target: float = option(6.0, "adaptive controller: nats a sequence", above=0)
    kl_horizon: float = option(10000.0, "adaptive controller: sequences", above=0)
    kl_mode: str = option(
        "cumulative", "remax: the divergence from here on, or this token's", choices=("cumulative", "one-step")
    )
    loss: str = option(
        "sequence", "policy gradients: mean over sequences or over tokens", choices=("sequence", "token-mean")
    )
    baseline_decay: float = option(
        1.0, "reinforce: an earlier step's weight in the baseline falls by this; 1: the mean of all", above=0, most=1
    )
    missing_eos_penalty: float | None = option(None, "taken off the score of a completion that does not end", least=0)
    reward_clip: float | None = option(None, "scores are clipped to [-c, c]", above=0)
    whiten_rewards: bool = option(False, "per-token rewards to unit variance")
    whiten_advantages: bool = option(True, "advantages to zero mean and unit variance")
    advantage_clip: float | None = option(None, "PPO: whitened advantages are clipped to [-c, c]", above=0)
    gamma: float = option(1.0, "discount", least=0, most=1)
    lam: float = option(0.95, "lambda of GAE", least=0, most=1)
    cliprange: float = option(0.2, "of the policy's ratio", above=0)
    cliprange_value: float = option(0.2, "of the value's step", above=0)
    vf_coef: float | None = option(None, "weight of the value loss", least=0)
    beta: float = option(0.1, "dpo: weight of log pi - log pi_ref in the implicit reward", above=0)
    length_coef: float = option(0.01, "r-dpo: alpha, a pair's logit for each token that chosen is longer")
    label_smoothing: float = option(0.0, "dpo: share of pairs whose labels are the wrong way round", least=0, most=0.5)
    precompute_ref_logprobs: bool = option(False, "dpo: read the reference once, before the first step")
    eta: float = option(7.5e-3, "inpo: step of a round; the margin's goal is 1 / (2 eta) nats", above=0)
    tau_ratio: float = option(1 / 3, "inpo: tau / eta, the reference's weight beside pi_t's", least=0, most=1)
    rounds: int = option(3, "inpo: of equal length; each samples with the policy as it then is", least=1)
    reward_loss_coef: float = option(0.1, "hydra-sft: weight of the preference loss", least=0)

    # what is kept and shown
    logging_steps: int = option(1, "steps between lines of the terminal", least=1)
    save_steps: int = option(50, "steps between checkpoints; 0: only at the end", least=0)
    save_total_limit: int = option(2, "checkpoints kept", least=1)
    eval_steps: int = option(0, "steps between evaluations; 0: only at the end", least=0)
    num_sample_completions: int = option(8, "completions recorded at each evaluation", least=0)
    report_to: list[str] = option([], "trackers, through accelerate", choices=TRACKERS)
    report: bool = option(True, "write report.html and plots at the end")

    @property
    def micro_batch(self) -> int:
        """Sequences a micro-batch."""
        return self.per_device_train_batch_size or MICRO_BATCH

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From keys and values as YAML gives them; UserError for an unknown key or a value of the wrong type."""
        return cls(**typed(cls, config_parser(), values))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """From a YAML file that maps field names to values; fields left out keep their defaults."""
        return cls.from_dict(read_yaml(path))

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The YAML text that `from_yaml` reads back; also written to `path` if one is given."""
        import yaml

        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def validate(self) -> Self:
        """A copy with values of the declared types; UserError, naming the key, for the first thing that cannot work.

        Reads nothing but the paths' existence and writes nothing.
        """
        config = replace(self, **typed(type(self), config_parser(), asdict(self)))
        if config.report_to == ["none"]:
            config.report_to = []
        check_ranges(config)
        check_combinations(config)
        return config


@cache
def config_parser() -> Any:
    """The one parser behind flags, YAML and keywords."""
    return build_parser(TrainConfig)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError when it is missing, malformed or something other than a mapping."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: cannot read {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: {str(path)!r} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"config: {str(path)!r} must map names to values, found {type(values).__name__}")
    return values or {}


def check_combinations(config: TrainConfig) -> None:
    """UserError for values that are fine alone but not together, and for paths that are not there."""
    _check_device(config.device)
    for name in ("kv_memory", "memory_budget"):
        _check_bytes(name, getattr(config, name))
    _check_trackers(config.report_to)
    for key in ("model", "reward_model", "prompts", "eval_prompts", "demonstrations"):
        _check_path(key, getattr(config, key))
    if config.prompts is None and config.model != "demo":
        raise UserError("prompts: needed (a JSONL file or a `datasets` name) with any model other than demo")
    if config.reward_weights and len(config.reward_weights) != len(config.reward):
        raise UserError(
            f"reward_weights: {len(config.reward_weights)} weights for {len(config.reward)} rewards; give one for each"
        )
    _check_held_out(config)
    if config.demonstrations and config.algorithm not in ONLINE:
        raise UserError(f"demonstrations: {config.algorithm} learns from prompts alone; it is for {', '.join(ONLINE)}")
    if config.reward and config.reward_model:
        raise UserError("reward and reward_model: give one of them")
    if config.reward_model and config.algorithm not in REWARD_MODEL:
        raise UserError(f"reward_model: {config.algorithm} has one base; it is for {', '.join(REWARD_MODEL)}")
    if config.algorithm in ONLINE and config.rollout_batch_size < config.num_mini_batches:
        raise UserError(
            f"num_mini_batches: {config.num_mini_batches} cannot be cut from "
            f"rollout_batch_size={config.rollout_batch_size}"
        )
    if Path(config.output_dir).is_file():
        raise UserError(f"output_dir: {config.output_dir!r} is a file")


def _check_held_out(config: TrainConfig) -> None:
    """Algorithms that learn from a file use a reward on held-out prompts alone."""
    if config.algorithm in ONLINE:
        return
    if config.reward and config.algorithm == "reward":
        raise UserError("reward: the algorithm of that name generates nothing that could be scored")
    if config.reward and config.eval_prompts is None and (config.model != "demo" or config.prompts is not None):
        raise UserError(f"reward: {config.algorithm} scores completions of eval_prompts alone; give some")
    if config.eval_prompts and not config.reward:
        raise UserError(f"eval_prompts: {config.algorithm} completes them only to score them; give a reward")


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device: {device!r} is not cpu, cuda or cuda:N")


def _check_bytes(name: str, value: str | int | None) -> None:
    from rlhf_kernels.memory_size import parse_bytes

    try:
        parse_bytes(0 if value is None else value)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def _check_trackers(names: list[str]) -> None:
    for name in names:
        packages = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(find_spec(package) for package in packages):
            raise UserError(f"report_to: {name} is not installed; metrics.jsonl is written in any case")


def _check_path(key: str, value: str | None) -> None:
    """Existence of what is clearly a path; a name such as `org/name` may be on the hub and is left to its loader."""
    if value is None or Path(value).exists():
        return
    looks_local = value.startswith(("/", ".", "~")) or value.endswith((".jsonl", ".json")) or value.count("/") > 1
    if looks_local:
        raise UserError(f"{key}: {value!r} does not exist")
