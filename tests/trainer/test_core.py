"""A run from its files to its results: what it writes, what it refuses, and what happens when a reward fails."""

import json
import sys
import types

import pytest
import tiny
import torch
from safetensors.torch import load_file

from rlhf_trainer import train
from rlhf_trainer.algorithms import TABLE
from rlhf_trainer.errors import UserError
from rlhf_trainer.metrics import read_lines
from rlhf_trainer.rewards import RewardError

ONLINE = [name for name, row in TABLE.items() if row.data is None]


@pytest.fixture
def rewards(monkeypatch):
    """A module of reward functions under a dotted path."""
    module = types.ModuleType("tiny_rewards")
    module.calls = []

    def length(prompts, completions, **columns):
        module.calls.append((prompts, completions, columns))
        return [float(len(text.split())) for text in completions]

    def fails_later(prompts, completions, **columns):
        module.calls.append(prompts)
        if len(module.calls) > 2:
            raise RuntimeError("the service is down")
        return [0.0] * len(prompts)

    module.length, module.fails_later = length, fails_later
    module.not_a_number = lambda prompts, completions, **columns: [float("nan")] * len(prompts)
    monkeypatch.setitem(sys.modules, "tiny_rewards", module)
    return module


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("algorithm", ONLINE)
def test_a_run_records_the_metrics_and_leaves_its_results(tmp_path, algorithm):
    result = train(tiny.config(tmp_path, algorithm))
    out = result.output_dir
    rows = lines(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    expected = {"objective/kl", "objective/scores", "objective/rlhf_reward", "reward", "reward_std", "lr", "grad_norm"}
    expected |= {"completions/mean_length", "completions/clipped_ratio", "sampling/logp_difference_max"}
    expected |= {"timing/generate", "timing/score", "timing/update", "memory/kv_peak", "memory/peak"}
    if "critic" in TABLE[algorithm].trained:
        expected |= {"loss/value_avg"}
    if "ppo" in algorithm:
        expected |= {"policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"}
    assert expected <= rows[0].keys()
    assert rows[0]["objective/kl"] == 0.0
    assert rows[0]["memory/kv_peak"] <= 2**20
    assert result.metrics["reward"] == rows[1]["reward"]
    assert {row["step"] for row in lines(out / "samples.jsonl")} == {1, 2}
    assert (out / "tokenizer.json").exists()
    assert not (out / ".result").exists()
    assert [entry.name for entry in out.glob(".partial*")] == []


def test_an_adapter_loads_in_peft_and_gives_the_models_logprobs(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = train(tiny.config(tmp_path, "hydra-ppo", learning_rate=1e-2))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(3, 15)[None]
    before = base(tokens).logits
    tuned = PeftModel.from_pretrained(base, str(result.output_dir / "actor"))
    after = tuned(tokens).logits
    assert (after - before).abs().max() > 1e-2
    from rlhf_kernels.nn import HydraModel, LoraSpec

    model = HydraModel.from_pretrained(
        str(tmp_path / "model"), adapters={"actor": LoraSpec(4, 8), "critic": LoraSpec(4, 8)}, dtype=torch.float32
    )
    model.load_adapters(str(result.output_dir))
    ours = model.score(tokens[0], torch.tensor([12]), roles=("actor",))["actor"].logprob
    theirs = after[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ["ppo", "remax", "sft", "hydra-sft", "reward"])
def test_a_trained_base_is_a_transformers_checkpoint(tmp_path, algorithm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(tiny.config(tmp_path, algorithm))
    model = AutoModelForCausalLM.from_pretrained(result.output_dir)
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    AutoTokenizer.from_pretrained(result.output_dir)
    started = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(started[name], model.state_dict()[name])


@pytest.mark.parametrize("first", ["hydra-sft", "reward"])
def test_the_stages_before_feed_ppo(tmp_path, first):
    stage = train(tiny.config(tmp_path, first, output_dir=str(tmp_path / "stage")))
    heads = load_file(stage.output_dir / "heads.safetensors")
    assert list(heads) == ["reward.weight"]
    source = {"model": str(stage.output_dir)} if first == "hydra-sft" else {"reward_model": str(stage.output_dir)}
    algorithm = "hydra-ppo" if first == "hydra-sft" else "ppo"
    result = train(tiny.config(tmp_path, algorithm, total_steps=1, **source))
    assert result.metrics["reward_std"] > 0


def test_a_model_without_a_reward_head_needs_a_reward_function(tmp_path, rewards):
    tiny.checkpoint(tmp_path / "model", reward_head=False)
    config = tiny.config(tmp_path)
    with pytest.raises(UserError, match=r"reward: .* has no reward head"):
        train(config)
    assert not (tmp_path / "out").exists()
    result = train(tiny.config(tmp_path, reward=["tiny_rewards:length"]))
    assert result.metrics["reward"] == pytest.approx(sum(map(len, map(str.split, rewards.calls[-1][1]))) / 6)


def test_a_reward_function_sees_prompts_completions_and_columns(tmp_path, rewards):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{tiny.WORDS[i]} {tiny.WORDS[i + 1]}", "answer": i} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(tiny.config(tmp_path, "remax", prompts=str(path), reward=["tiny_rewards:length"], total_steps=1))
    prompts, completions, columns = rewards.calls[0]
    assert len(prompts) == len(completions) == 12  # sampled and greedy together
    assert [tiny.WORDS.index(prompt.split()[0]) for prompt in prompts] == columns["answer"]
    assert not any("</s>" in text for text in completions)


def test_a_reward_that_fails_stops_the_run_after_saving_it(tmp_path, rewards):
    config = tiny.config(tmp_path, reward=["tiny_rewards:fails_later"], total_steps=5, save_steps=100)
    with pytest.raises(RewardError, match="the service is down"):
        train(config)
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
    rewards.calls.clear()
    config.resume, config.total_steps = True, 4
    assert train(config).step == 4
    assert [row["step"] for row in lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_memory": 2048}, "kv_memory"),
        ({"model": "/nowhere/at/all"}, "model: '/nowhere/at/all' does not exist"),
        ({"prompts": "/nowhere.jsonl"}, "prompts: '/nowhere.jsonl' does not exist"),
        ({"reward": ["tiny_rewards:missing"]}, "reward"),
        ({"algorithm": "ppo", "lora_r": 4}, "lora_r"),
        ({"lora_r": 0}, "lora_r"),
        ({"max_completion_length": 1000}, "max_position_embeddings"),
        ({"lora_target_modules": "no_such_layer"}, "no_such_layer"),
    ],
    ids=["kv_memory", "model", "prompts", "reward", "ppo-rank", "hydra-rank", "positions", "targets"],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(tmp_path, rewards, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        train(tiny.config(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_prompt_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "kaban"}\n{"prompt": " "}\n')
    with pytest.raises(UserError, match="line 2: the prompt is empty"):
        train(tiny.config(tmp_path, prompts=str(path)))
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_a_run_is_not_overwritten(tmp_path):
    train(tiny.config(tmp_path))
    with pytest.raises(UserError, match="already holds checkpoints"):
        train(tiny.config(tmp_path))


def test_held_out_prompts_are_evaluated_with_the_same_draws_each_time(tmp_path):
    held_out = tiny.prompts(tmp_path / "eval.jsonl", count=4)
    config = tiny.config(tmp_path, eval_prompts=held_out, eval_steps=1, learning_rate=1e-12)
    result = train(config)
    first, second = (row["eval/reward"] for row in result.history)
    assert first == pytest.approx(second, abs=1e-5)
    assert result.history[0]["eval/kl"] == pytest.approx(0.0, abs=1e-5)
    untrained = next(read_lines(result.output_dir / "metrics.jsonl"))
    assert untrained == {"step": 0, **{k: pytest.approx(untrained[k]) for k in untrained if k.startswith("eval/")}}
    assert untrained["eval/reward"] == pytest.approx(first, abs=1e-5)
    samples = list(read_lines(result.output_dir / "samples.jsonl"))
    shown = [[row["prompt"] for row in samples if row["step"] == step] for step in (0, 2)]
    assert shown[0] == shown[1]


def test_the_controller_moves_the_coefficient(tmp_path):
    config = tiny.config(tmp_path, kl_controller="adaptive", kl_horizon=10.0, total_steps=3)
    coefficients = [row["objective/kl_coef"] for row in train(config).history]
    assert coefficients[0] == pytest.approx(0.02)
    assert coefficients[1] == pytest.approx(0.02 * (1 - 0.2 * 6 / 10))


@pytest.mark.parametrize("estimator", ["full_kl", "full_js", "jensen_shannon", "none"])
def test_estimators_run_end_to_end(tmp_path, estimator):
    result = train(tiny.config(tmp_path, kl_estimator=estimator, learning_rate=3e-2))
    penalty = result.metrics["objective/non_score_reward"]
    assert (penalty == 0) if estimator == "none" else (penalty < 0)


def test_hydra_ppo_takes_the_steps_of_lora_ppo_with_a_quarter_of_the_bases(tmp_path):
    runs = [train(tiny.config(tmp_path, a, output_dir=str(tmp_path / a))) for a in ("lora-ppo", "hydra-ppo")]
    for name in ("reward", "objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"):
        assert runs[0].metrics[name] == pytest.approx(runs[1].metrics[name], abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("algorithm", ["hydra-ppo", "ppo", "remax"])
def test_gradient_checkpointing_changes_nothing(tmp_path, algorithm):
    runs = [
        train(tiny.config(tmp_path, algorithm, gradient_checkpointing=on, output_dir=str(tmp_path / f"out-{on}")))
        for on in (False, True)
    ]
    for name in ("reward", "loss/policy_avg", "grad_norm"):
        assert runs[0].metrics[name] == pytest.approx(runs[1].metrics[name], rel=1e-5)


def test_bfloat16_trains(tmp_path):
    result = train(tiny.config(tmp_path, "ppo", dtype="bfloat16", learning_rate=1e-4))
    assert result.metrics["sampling/logp_difference_max"] < 0.3
    assert result.metrics["grad_norm"] > 0
