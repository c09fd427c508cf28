"""Every online algorithm raises a reward that it can see: the share of a completion's words that begin with "ka"."""

import sys
import types

import pytest
import tiny

from rlhf_trainer import train

TUNED = {  # algorithm -> rollouts, learning rate
    "ppo": (30, 3e-3),
    "lora-ppo": (30, 2e-2),
    "j-hydra-ppo": (30, 2e-2),
    "hydra-ppo": (30, 2e-2),
    "ppo-max": (50, 3e-3),
    "pe-rlhf": (50, 2e-2),
    "remax": (60, 5e-3),
    "reinforce": (60, 5e-3),
    "rloo": (30, 5e-3),
    "raft": (30, 5e-3),
    "superhf": (30, 2e-2),
    "inpo": (15, 2e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", TUNED)
def test_the_reward_rises(tmp_path, monkeypatch, algorithm):
    module = types.ModuleType("ka_reward")
    module.share = lambda prompts, completions, **_: [
        sum(word.startswith("ka") for word in text.split()) / max(len(text.split()), 1) for text in completions
    ]
    monkeypatch.setitem(sys.modules, "ka_reward", module)
    steps, rate = TUNED[algorithm]
    settings = {"reward": ["ka_reward:share"], "rollout_batch_size": 24, "kl_coef": 0.0, "total_steps": steps}
    config = tiny.config(tmp_path, algorithm, per_device_train_batch_size=24, learning_rate=rate, **settings)
    history = [row["reward"] for row in train(config).history]
    assert sum(history[-5:]) / 5 > sum(history[:5]) / 5 + 0.2
