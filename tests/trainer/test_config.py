"""A configuration from YAML, flags or keywords: the same checks, the same words, the key named."""

import dataclasses

import pytest

from rlhf_trainer.config import TrainConfig
from rlhf_trainer.errors import UserError
from rlhf_trainer.names import ALGORITHMS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_defaults_of_every_algorithm_are_valid_with_the_demo_model(algorithm):
    assert TrainConfig(algorithm=algorithm).validate().algorithm == algorithm


def test_yaml_written_and_read_back_is_the_same_configuration(tmp_path):
    config = TrainConfig(
        algorithm="remax", learning_rate=1e-6, reward=["a.b:c"], stop_token_ids=[1, 2], kv_memory=4096, resume=True
    )
    config.to_yaml(tmp_path / "config.yaml")
    assert TrainConfig.from_yaml(tmp_path / "config.yaml") == config


def test_yaml_takes_what_people_write(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-5\ngamma: 1\nreward: pkg.mod:f\nstop_token_ids: [3]\nlora_r: null\nmodel: '1'\n")
    config = TrainConfig.from_yaml(path)
    assert config.learning_rate == 1e-5
    assert isinstance(config.gamma, float)
    assert config.reward == ["pkg.mod:f"]
    assert config.stop_token_ids == [3]
    assert config.lora_r is None
    assert config.model == "1"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kl_coeff": 0.1}, r"unknown key 'kl_coeff'; did you mean 'kl_coef'\?"),
        ({"lr": 0.1}, r"unknown key 'lr'; did you mean 'learning_rate'\?"),
        ({"total_steps": 2.5}, r"total_steps: expected a whole number, got 2.5"),
        ({"total_steps": True}, r"total_steps: expected a whole number, got True"),
        ({"kl_coef": "much"}, r"kl_coef: expected a number or null, got 'much'"),
        ({"whiten_rewards": "perhaps"}, r"whiten_rewards: expected true or false, got 'perhaps'"),
        ({"stop_token_ids": ["x"]}, r"stop_token_ids: expected a list of whole numbers, got \['x'\]"),
        ({"model": None}, r"model: expected text, got None"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_an_unknown_key_or_a_wrong_type_is_named(values, words):
    with pytest.raises(UserError, match=f"^{words}$"):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"algorithm": "hydra_ppo"}, "algorithm: 'hydra_ppo' is not one of .*did you mean 'hydra-ppo'"),
        ({"kl_estimator": "k4"}, "kl_estimator: 'k4' is not one of kl, clamped_kl"),
        ({"gamma": 1.5}, "gamma: must be at most 1, got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate: must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be finite, got nan"),
        ({"num_generations": 0}, "num_generations: must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature: must be above 0"),
        ({"total_steps": "many"}, "total_steps: expected a whole number, got 'many'"),
        ({"kv_memory": "12 parsecs"}, "kv_memory: .*'12 parsecs'"),
        ({"device": "tpu"}, "device: 'tpu' is not cpu, cuda or cuda:N"),
        ({"model": "/no/such/model"}, "model: '/no/such/model' does not exist"),
        ({"prompts": "missing.jsonl"}, "prompts: 'missing.jsonl' does not exist"),
        ({"model": "org/name"}, "prompts: needed"),
        ({"reward": ["a:b"], "reward_weights": [1.0, 2.0]}, "reward_weights: 2 weights for 1 rewards"),
        ({"algorithm": "reward", "reward": ["a:b"]}, "reward: the algorithm of that name generates nothing"),
        ({"reward_model": "org/rm"}, "reward_model: hydra-ppo has one base"),
        ({"num_mini_batches": 65}, "num_mini_batches: 65 cannot be cut from rollout_batch_size=64"),
        ({"report_to": ["dvclive"]}, "report_to: dvclive is not installed"),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_a_value_that_cannot_work_is_named(values, words):
    with pytest.raises(UserError, match=words) as caught:
        TrainConfig(**values).validate()
    assert "\n" not in str(caught.value)


def test_validate_gives_values_their_declared_types_and_leaves_the_original_alone():
    config = TrainConfig(gamma=1, total_steps="5")  # type: ignore[arg-type]
    checked = config.validate()
    assert isinstance(checked.gamma, float)
    assert checked.total_steps == 5
    assert config.total_steps == "5"


def test_every_option_says_what_it_is_and_defaults_are_never_shared():
    assert all(f.metadata["help"] for f in dataclasses.fields(TrainConfig))
    TrainConfig().reward.append("x")
    assert TrainConfig().reward == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "must map names to values, found list"),
        ("a: [1,\n", "is not YAML"),
        (None, "cannot read"),
    ],
    ids=["list", "malformed", "missing"],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        TrainConfig.from_yaml(path)
    assert "\n" not in str(caught.value)
