"""A small trainer for RLHF: `train(TrainConfig(algorithm="hydra-ppo", ...))` from Python, `rlhf-train` from a shell."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_trainer.config import TrainConfig
    from rlhf_trainer.core import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when something is used, so that `rlhf-train --help` is quick."""
    if name == "TrainConfig":
        from rlhf_trainer.config import TrainConfig

        return TrainConfig
    if name in ("train", "TrainResult"):
        from rlhf_trainer import core

        return getattr(core, name)
    raise AttributeError(f"module 'rlhf_trainer' has no attribute {name!r}")
