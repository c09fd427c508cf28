"""What a user does: their own checkpoint and tokenizer, prompts and reward, through the command line."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_kernels.nn import HydraModel, LoraSpec, Role
from rlhf_trainer import TrainConfig, checkpoint, train
from rlhf_trainer.cli import main
from rlhf_trainer.errors import UserError

CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
REWARDS = """
calls = 0
def vowels(prompts, completions, **columns):
    assert set(columns) == {"want"} and len(columns["want"]) == len(prompts)
    return [text.count(letter) / (len(text) + 1) for text, letter in zip(completions, columns["want"])]
def nan(prompts, completions, **columns): return [float("nan")] * len(prompts)
def short(prompts, completions, **columns): return [0.0]
def boom(prompts, completions, **columns): raise KeyError("no service")
def third(prompts, completions, **columns):
    global calls
    calls += 1
    if calls >= 3: raise RuntimeError("the service\\nis down")
    return [float(len(text)) for text in completions]
"""


def _tokenizer(chat=False):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    core.train_from_iterator(["the cat sat on the mat and looked at the moon"] * 4 + ["the hen saw them"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    if chat:
        made.chat_template = CHAT
    return made


def _model(name, vocabulary):
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    common = {"vocab_size": vocabulary, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.2, **common)
        )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(
        Qwen2Config(
            num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.2, tie_word_embeddings=True,
            **sizes, **common,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints qwen2 and gpt2 as directories, and JSONL files."""
    folder = tmp_path_factory.mktemp("journey")
    for name in ("qwen2", "gpt2"):
        tokenizer = _tokenizer(chat=True)
        _model(name, len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"the cat number {i} sat on", "want": "aeiou"[i % 5]} for i in range(8)]
    pairs = [{"prompt": f"the cat {i} sat", "chosen": " on the mat", "rejected": f" {i}!"} for i in range(8)]
    chats = [{"messages": [{"role": "user", "content": f"cat {i}?"}]} for i in range(6)]
    answered = [{"messages": [*row["messages"], {"role": "assistant", "content": "the mat"}]} for row in chats]
    files = {
        "prompts": rows,
        "pairs": [row | {"completion": row["chosen"]} for row in pairs],
        "chats": chats,
        "answered": answered,
        "nocolumn": [{"text": "the cat"}],
        "empty": [{"prompt": "the cat"}, {"prompt": " "}],
        "unasked": [{"prompt": "", "chosen": "x", "rejected": "y"}],
        "number": [{"prompt": 3}],
        "long": [{"prompt": "the cat sat " * 90, "completion": "x", "chosen": "x", "rejected": "y"}],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "malformed.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": \n')
    (folder / "user_rewards.py").write_text(REWARDS)
    (folder / "unknown.yaml").write_text("learning_rat: 1e-5\n")
    (folder / "type.yaml").write_text("learning_rate: [1, 2]\n")
    (folder / "no_model").mkdir()
    (folder / "an_adapter").mkdir()
    (folder / "an_adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(folder / "qwen2", folder / "cut")
    weights = (folder / "qwen2" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(weights[:900])
    return folder


@pytest.fixture
def here(made, monkeypatch):
    """The folder as the current directory, as a user has it who names a module of their own."""
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    return made


SMALL = {
    "total_steps": 2,
    "rollout_batch_size": 4,
    "per_device_train_batch_size": 3,
    "max_completion_length": 8,
    "kv_memory": "2MiB",
    "learning_rate": 1e-2,
    "report": False,
}
RANKS = {"hydra-ppo": 4, "lora-ppo": 4, "j-hydra-ppo": 4}


def _settings(algorithm, model, output, **changes):
    settings = SMALL | {"algorithm": algorithm, "model": model, "output_dir": str(output)}
    if algorithm in ("sft", "reward", "hydra-sft"):
        settings |= {"prompts": "pairs.jsonl"}
    else:
        settings |= {"prompts": "prompts.jsonl", "reward": ["user_rewards:vowels"]}
    if algorithm in RANKS:
        settings["lora_r"] = RANKS[algorithm]
    return settings | changes


def _flags(settings):
    """The same settings as a command line."""
    words = [settings["algorithm"]]
    for name, value in settings.items():
        if name != "algorithm":
            values = value if isinstance(value, list) else [value]
            words += [
                f"--{name.replace('_', '-')}",
                *(str(v).lower() if isinstance(v, bool) else str(v) for v in values),
            ]
    return words


def _curve(output):
    """metrics.jsonl without what the clock and the machine say."""
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    timing = ("timing/", "memory/", "sampling/tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines]


@pytest.mark.parametrize("model", ["qwen2", "gpt2"])
@pytest.mark.parametrize(
    "algorithm", ["hydra-ppo", "j-hydra-ppo", "lora-ppo", "ppo", "remax", "sft", "reward", "hydra-sft"]
)
def test_a_users_checkpoint_trains_and_its_result_loads_elsewhere(here, tmp_path, algorithm, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "out"
    assert main(_flags(_settings(algorithm, model, output))) == 0
    tokens = torch.tensor(AutoTokenizer.from_pretrained(output)("the cat sat on the mat")["input_ids"])
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        before = base(tokens[None]).logits[0]
    if algorithm not in RANKS:
        trained = AutoModelForCausalLM.from_pretrained(output).eval()
        with torch.no_grad():
            assert not torch.equal(trained(tokens[None]).logits[0], before)
        return
    from peft import PeftModel

    name = "joint" if algorithm == "j-hydra-ppo" else "actor"
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, str(output / name)).eval()(tokens[None]).logits[0]
    spec = yaml.safe_load((output / "config.yaml").read_text())
    model_again = HydraModel.from_pretrained(
        model,
        adapters={name: LoraSpec(r=spec["lora_r"], alpha=spec["lora_alpha"])},
        roles={"actor": Role(name, "lm")},
        dtype=torch.float32,
        device="cpu",
    )
    model_again.load_adapters(str(output))
    ours = model_again.score(tokens, torch.tensor([len(tokens)]), roles=("actor",))["actor"].logprob
    theirs = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    assert (logits - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


BAD = {
    "unknown-key": ({"learning_rat": 1.0}, "did you mean --learning-rate?"),
    "wrong-type": ({"learning_rate": "fast"}, "a number"),
    "missing-column": ({"prompts": "nocolumn.jsonl"}, "line 1: no column 'prompt'; columns present: text"),
    "empty-prompt": ({"prompts": "empty.jsonl"}, "empty.jsonl, line 2: the prompt is empty"),
    "prompt-is-a-number": ({"prompts": "number.jsonl"}, "must be text"),
    "malformed-jsonl": ({"prompts": "malformed.jsonl"}, "malformed.jsonl, line 2: not JSON"),
    "no-such-prompts": ({"prompts": "absent.jsonl"}, "does not exist"),
    "bad-held-out-prompts": ({"eval_prompts": "empty.jsonl"}, "empty.jsonl, line 2"),
    "kv-budget": ({"kv_memory": "4KiB", "max_completion_length": 64}, "kv_memory"),
    "too-long-for-the-model": ({"max_completion_length": 500}, "max_position_embeddings of 96"),
    "no-such-path": ({"model": "./absent"}, "model: './absent' does not exist"),
    "directory-without-model": ({"model": "no_model"}, "model: 'no_model' holds no config.json"),
    "adapter-as-model": ({"model": "an_adapter"}, "holds a PEFT adapter"),
    "weights-cut-short": ({"model": "cut"}, "model: 'cut' cannot be loaded"),
    "no-such-reward": ({"reward": ["user_rewards:absent"]}, "has no 'absent'"),
    "no-such-device": ({"device": "cuda:99"}, "device: 'cuda:99'"),
    "output-below-a-file": ({"output_dir": "prompts.jsonl/out"}, "output_dir: 'prompts.jsonl/out' cannot be made"),
    "output-refused": ({"output_dir": "/proc/no/out"}, "output_dir"),
    "no-such-target": ({"lora_target_modules": "wings"}, "'wings' is no Linear"),
    "sft-without-completions": ({"algorithm": "sft", "reward": [], "lora_r": None}, "no column 'completion'"),
    "pair-without-prompt": (
        {"algorithm": "hydra-sft", "reward": [], "lora_r": None, "prompts": "unasked.jsonl"},
        "line 1: the prompt is empty",
    ),
    "sft-too-long": (
        {"algorithm": "sft", "reward": [], "lora_r": None, "prompts": "long.jsonl"},
        "above the model's max_position_embeddings of 96",
    ),
}


@pytest.mark.filterwarnings("ignore:.*cut on the left")
@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_from_the_shell_and_from_python_and_leaves_nothing(
    here, tmp_path, capsys, changes, words
):
    output = tmp_path / "out"
    settings = {k: v for k, v in (_settings("hydra-ppo", "qwen2", output) | changes).items() if v not in (None, [])}
    assert main(_flags(settings)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1, lines
    assert words in lines[0]
    with pytest.raises((UserError, TypeError)) as raised:
        train(TrainConfig(**settings))
    if raised.type is not TypeError:  # an unknown keyword is Python's own error
        assert words in str(raised.value)
    assert not output.exists()


@pytest.mark.parametrize(("file", "words"), [("unknown", "did you mean 'learning_rate'"), ("type", "learning_rate:")])
def test_a_yaml_file_is_checked_like_flags(here, capsys, file, words):
    assert main(["hydra-ppo", "--config", f"{file}.yaml", "--model", "qwen2"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("nan", "not a finite number, on prompt 'the cat number"),
        ("short", "returned 1 numbers for 4 completions"),
        ("boom", "raised KeyError"),
    ],
)
def test_a_reward_that_fails_at_once_is_one_line_and_can_be_mended(here, tmp_path, capsys, reward, words):
    settings = _settings("hydra-ppo", "qwen2", tmp_path / "out", reward=[f"user_rewards:{reward}"])
    assert main(_flags(settings)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_reward_that_fails_at_the_third_step_leaves_two_whole_steps_to_go_on_from(here, tmp_path, capsys):
    output = tmp_path / "out"
    settings = _settings("hydra-ppo", "qwen2", output, reward=["user_rewards:third"], total_steps=4, save_steps=1)
    assert main(_flags(settings)) == 2
    assert "the service is down" in capsys.readouterr().err
    assert checkpoint.steps(output) == [1, 2]
    assert [row["step"] for row in _curve(output)] == [1, 2]


def test_a_reward_that_fails_in_the_evaluation_does_not_lose_the_steps_line(here, tmp_path, monkeypatch):
    from rlhf_trainer.online import Online
    from rlhf_trainer.rewards import RewardError

    evaluate, calls = Online.evaluate, []

    def fail(self):
        calls.append(self)
        if len(calls) == 2:  # the first is before training
            raise RewardError("reward: held-out")
        return evaluate(self)

    settings = _settings("hydra-ppo", "qwen2", tmp_path / "out", eval_prompts="prompts.jsonl", eval_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(Online, "evaluate", fail)
        with pytest.raises(RewardError):
            train(TrainConfig(**settings))
    train(TrainConfig(**settings, resume=True))
    assert [row["step"] for row in _curve(tmp_path / "out")] == [0, 1, 2]


def test_held_out_completions_are_recorded_for_the_same_prompts_each_time(here, tmp_path):
    changes = {"eval_prompts": "prompts.jsonl", "eval_steps": 1, "num_sample_completions": 3}
    train(TrainConfig(**_settings("hydra-ppo", "qwen2", tmp_path / "out", **changes)))
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    asked = {step: [row["prompt"] for row in rows if row["step"] == step] for step in (0, 1, 2)}
    assert asked[0] == asked[1] == asked[2] == [f"the cat number {i} sat on" for i in range(3)]


@pytest.mark.parametrize("algorithm", ["hydra-ppo", "ppo"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_checkpoint_before(
    here, tmp_path, monkeypatch, capsys, algorithm
):
    changes = {"total_steps": 4, "save_steps": 1, "kl_controller": "adaptive", "lr_scheduler_type": "cosine"}
    train(TrainConfig(**_settings(algorithm, "qwen2", tmp_path / "whole", **changes)))
    settings = _settings(algorithm, "qwen2", tmp_path / "out", **changes)
    real = checkpoint.save_file

    def full(tensors, path, *rest, **options):
        real(tensors, path, *rest, **options)
        if "checkpoint-3" in str(path) and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert main(_flags(settings)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert checkpoint.steps(tmp_path / "out") == [1, 2]
    leftover = tmp_path / "out" / ".partial-checkpoint-3"  # as a kill while writing leaves it
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert main(["--output", str(tmp_path / "out"), "--resume"]) == 0
    assert not leftover.exists()
    assert _curve(tmp_path / "out") == _curve(tmp_path / "whole")


def test_resuming_with_other_settings_names_the_first_that_differs(here, tmp_path, capsys):
    settings = _settings("hydra-ppo", "qwen2", tmp_path / "out")
    train(TrainConfig(**settings))
    for words, said in (
        (["hydra-ppo", "--learning-rate", "0.5"], "resume: learning_rate was 0.01 in the checkpoint and is 0.5 now"),
        (["ppo"], "resume: algorithm was 'hydra-ppo' in the checkpoint and is 'ppo' now"),
    ):
        assert main([*words, "--output", str(tmp_path / "out"), "--resume"]) == 2
        assert said in capsys.readouterr().err
    assert main(["--output", str(tmp_path / "out"), "--resume", "--total-steps", "3"]) == 0
    assert [row["step"] for row in _curve(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("algorithm", "data"), [("hydra-ppo", "chats"), ("hydra-ppo", "answered"), ("sft", "answered")]
)
def test_chats_train_through_the_tokenizers_template(here, tmp_path, algorithm, data):
    changes = {"prompts": f"{data}.jsonl"} | ({"reward": ["user_rewards:third"]} if algorithm == "hydra-ppo" else {})
    import user_rewards

    user_rewards.calls = -100
    result = train(TrainConfig(**_settings(algorithm, "qwen2", tmp_path / "out", **changes)))
    assert result.step == 2
    if algorithm == "hydra-ppo":
        first = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
        assert first["prompt"].startswith("<user> cat ")
        assert first["prompt"].endswith("<assistant> ")


@pytest.mark.parametrize(
    "estimator",
    ["kl", "clamped_kl", "squared_error", "bregman", "jensen_shannon", "full_kl", "full_js", "none"],
)
def test_every_option_of_shaping_runs_with_every_estimator(here, tmp_path, estimator):
    changes = {
        "kl_estimator": estimator,
        "whiten_rewards": True,
        "missing_eos_penalty": 1.0,
        "reward_clip": 5.0,
        "kl_controller": "adaptive",
        "kl_target": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "num_mini_batches": 2,
        "num_generations": 2,
        "dtype": "bfloat16" if estimator == "full_kl" else "float32",
    }
    result = train(TrainConfig(**_settings("hydra-ppo", "qwen2", tmp_path / "out", **changes)))
    first, last = result.history
    assert first["objective/scores"] <= first["reward"]
    assert first["objective/kl"] == 0.0
    assert last["objective/kl"] != 0.0
    assert last["lr"] < SMALL["learning_rate"]
    assert all(v == v for row in result.history for v in row.values())
