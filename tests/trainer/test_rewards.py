"""Rewards: functions, classifiers and sums of them; what goes wrong names the reward and the prompt."""

import math
import sys

import pytest
import torch

from rlhf_trainer.config import TrainConfig
from rlhf_trainer.errors import UserError
from rlhf_trainer.rewards import ClassifierReward, RewardError, RewardSum, build_rewards, call_reward

MODULE = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]

def matches(prompts, completions, answer):
    return [1.0 if c == a else 0.0 for c, a in zip(completions, answer)]

class Scorer:
    @staticmethod
    def score(prompts, completions, **_):
        return [0.5] * len(prompts)

constant = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a module `my_rewards` of its own."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def test_no_reward_means_the_reward_head():
    assert build_rewards(TrainConfig()) is None


def test_functions_of_the_current_directory_are_weighted_and_summed(here):
    rewards = build_rewards(TrainConfig(reward=["my_rewards:length", "my_rewards:matches"], reward_weights=[0.5, 10.0]))
    assert rewards is not None
    assert rewards(["p", "q"], ["ab", "c"], {"answer": ["ab", "x"], "unused": [1, 2]}) == [11.0, 0.5]
    assert rewards.last == {"my_rewards:length": 1.5, "my_rewards:matches": 0.5}
    assert rewards([], [], {}) == []


def test_a_method_may_be_named_too(here):
    rewards = build_rewards(TrainConfig(reward=["my_rewards:Scorer.score"]))
    assert rewards is not None
    assert rewards(["p"], ["c"], {}) == [0.5]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "no module named 'no_such_module' in the current directory"),
        ("my_rewards:missing", "module 'my_rewards' has no 'missing'"),
        ("my_rewards:constant", "is int, not a function"),
        ("broken:f", "importing it raised .*ZeroDivisionError"),
        ("needs:f", "importing it failed: No module named 'not_installed'"),
        ("plain", "is neither pkg.mod:function nor the directory of a sequence classifier"),
        ("./nowhere", "does not exist"),
        (".", "is no sequence classifier that loads"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_one_line(here, name, words):
    (here / "broken.py").write_text("1 / 0\n")
    (here / "needs.py").write_text("import not_installed\n")
    with pytest.raises(RewardError, match=words) as caught:
        build_rewards(TrainConfig(reward=[name]))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def returning(value):
    return lambda prompts, completions, **_: value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1.0, math.nan, 2.0], "returned 'nan', not a finite number, on prompt 'second' with completion 'b'"),
        ([1.0, math.inf, 2.0], "returned 'inf', not a finite number, on prompt 'second'"),
        ([1.0, None, 2.0], "returned 'None', not a finite number, on prompt 'second'"),
        ([1.0, "good", 2.0], "not a finite number, on prompt 'second'"),
        ([1.0], "returned 1 numbers for 3 completions, on the batch that begins with prompt 'first'"),
        (0.5, "returned float, not a list of 3 numbers"),
        (None, "returned NoneType, not a list of 3 numbers"),
    ],
    ids=["nan", "inf", "none", "text", "short", "scalar", "nothing"],
)
def test_what_is_not_one_finite_number_a_completion_names_reward_and_prompt(value, words):
    with pytest.raises(RewardError, match=words) as caught:
        call_reward("m:f", returning(value), ["first", "second", "third"], ["a", "b", "c"], {})
    assert "'m:f'" in str(caught.value)


@pytest.mark.parametrize("culprit", range(5))
def test_a_function_that_raises_names_the_prompt_that_did_it(culprit):
    def reciprocal(prompts, completions, shift):
        return [1 / (int(c) - s) for c, s in zip(completions, shift)]

    prompts = [f"prompt {i}" for i in range(5)]
    completions = ["1" if i == culprit else "3" for i in range(5)]
    words = rf"reward 'm:f' raised ZeroDivisionError\('.*'\) on prompt 'prompt {culprit}'"
    with pytest.raises(RewardError, match=words) as caught:
        call_reward("m:f", reciprocal, prompts, completions, {"shift": [1] * 5})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    "made", [torch.tensor([1.0, 2.0]), (1, 2), [torch.tensor(1.0), 2]], ids=["tensor", "tuple", "mix"]
)
def test_tensors_and_tuples_of_numbers_are_fine(made):
    assert call_reward("m:f", returning(made), ["p", "q"], ["a", "b"], {}) == [1.0, 2.0]


def test_the_same_reward_twice_is_refused():
    with pytest.raises(RewardError, match="given twice"):
        build_rewards(TrainConfig(reward=["m:f", "m:f"]))


def test_a_sum_stops_at_the_reward_that_fails():
    rewards = RewardSum({"good:f": returning([1.0]), "bad:f": returning([math.nan])}, [1.0, 1.0])
    with pytest.raises(RewardError, match="'bad:f'"):
        rewards(["p"], ["c"], {})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A tiny sequence classifier on disk, with a word tokenizer trained on the spot and no pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<eos>", "<unk>", "good", "bad", "a", "b", "c"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = {}
    for labels in (1, 2):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_labels=labels, max_position_embeddings=32,
        )  # fmt: skip
        folder[labels] = tmp_path_factory.mktemp(f"classifier{labels}")
        LlamaForSequenceClassification(config).save_pretrained(folder[labels])
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(
            folder[labels]
        )
    return folder


def test_a_classifier_scores_a_batch_as_it_scores_each_text_alone(classifier):
    config = TrainConfig(reward=[str(classifier[1])], per_device_train_batch_size=2)
    rewards = build_rewards(config)
    assert rewards is not None
    prompts, completions = ["good ", "a b ", "c "], ["bad a b c", "good", "bad"]
    together = rewards(prompts, completions, {"ignored": [1, 2, 3]})
    alone = [rewards([p], [c], {})[0] for p, c in zip(prompts, completions)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(s, 6) for s in together}) == 3


def test_a_classifier_equals_its_own_forward(classifier):
    reward = ClassifierReward(str(classifier[1]), TrainConfig())
    ids = reward.tokenizer("good bad a", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = reward.model(input_ids=ids).logits[0, 0].item()
    assert reward(["good "], ["bad a"]) == pytest.approx([want], abs=1e-6)


def test_a_text_that_is_too_long_loses_its_beginning(classifier):
    reward = ClassifierReward(str(classifier[1]), TrainConfig())
    assert reward(["good " * 50], ["bad " * 32]) == pytest.approx(reward([""], ["bad " * 32]), abs=1e-6)


def test_a_classifier_with_several_labels_is_no_reward(classifier):
    with pytest.raises(RewardError, match="has 2 labels; a reward is one number"):
        build_rewards(TrainConfig(reward=[str(classifier[2])]))
