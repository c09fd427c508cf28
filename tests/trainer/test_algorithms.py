"""One update of every algorithm equals an independent plain-PyTorch version (`reference_algorithms.py`) to 1e-5."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import reference_algorithms as reference
import tiny
import torch
from safetensors.torch import load_file

from rlhf_trainer import core
from rlhf_trainer.algorithms import TABLE, find, with_defaults
from rlhf_trainer.models import load_tokenizer

ONLINE = [name for name, row in TABLE.items() if row.data is None]
SHAPED = {"missing_eos_penalty": 0.5, "reward_clip": 0.8, "temperature": 0.7, "kl_coef": 0.3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two checkpoints, as ppo with a reward model of its own has them."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.checkpoint(directory / "model", seed=0)
    tiny.checkpoint(directory / "reward_model", seed=1)
    return directory


class Run:
    """A phase of the trainer about to take its first step, its weights `moved` so that nothing is zero."""

    def __init__(self, directory: Path, algorithm: str, moved: bool = True, **changes):
        self.config = with_defaults(tiny.config(directory, algorithm, **changes).validate())
        torch.manual_seed(0)
        self.tokenizer = load_tokenizer(self.config)
        self.phase, self.policy = core.build_phase(self.config, find(algorithm), self.tokenizer)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.policy.trained.values() if moved else ():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        self.rollout = None
        if find(algorithm).data is None:
            update = self.phase._update

            def spy(rollout, step):
                self.rollout = copy.deepcopy(rollout)
                return update(rollout, step)

            self.phase._update = spy

    def net(self, role: str, directory: Path) -> reference.Net:
        """The role's weights as plain tensors, read from the files the model saves."""
        model, spec = self.policy.model, self.policy.layout.roles[role]
        skeleton = transformers_model(self.config.model)
        weights = {}
        for name, value in model.base_model(role).state_dict().items():
            weights[name.replace(".base_layer.", ".")] = value.detach().clone()
        weights = {name: weights[name] for name in skeleton.state_dict()}
        net = reference.Net(skeleton, weights)
        if spec.adapter is not None:
            model.save_pretrained(str(directory))
            net.scaling = self.config.lora_alpha / self.config.lora_r
            net.adapter = adapter(directory / spec.adapter)
        if spec.head != "lm":
            net.head = model.trainable_parameters(role)[-1].detach().clone()
        return net

    def nets(self, directory: Path) -> dict[str, reference.Net]:
        return {role: self.net(role, directory) for role in self.policy.layout.roles if role != "critic_start"}

    def sequences(self, rollout=None) -> list:
        rollout = rollout or self.rollout
        whole = rollout.tokens.split(rollout.lengths.tolist())
        return [(w[:p].tolist(), w[p:].tolist()) for w, p in zip(whole, rollout.prompt_lengths.tolist())]


def transformers_model(path: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


def adapter(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{module: (A, B)} from a directory in PEFT's layout."""
    saved = load_file(directory / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    modules = [name[len(prefix) : -len(suffix)] for name in saved if name.endswith(suffix)]
    return {m: (saved[f"{prefix}{m}{suffix}"], saved[f"{prefix}{m}.lora_B.weight"]) for m in modules}


def assert_same(got: dict[str, reference.Net], expected: dict[str, reference.Net], moved: bool = True) -> None:
    for role, net in expected.items():
        for name, value in net.weights.items():
            torch.testing.assert_close(got[role].weights[name], value.detach(), atol=1e-5, rtol=0, msg=f"{role} {name}")
        for module, pair in net.adapter.items():
            for ours, theirs in zip(got[role].adapter[module], pair):
                torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0, msg=f"{role} {module}")
        if net.head is not None:
            torch.testing.assert_close(got[role].head, net.head.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "shaping", [{}, SHAPED, {"whiten_rewards": True, "gamma": 0.9}], ids=["plain", "shaped", "white"]
)
@pytest.mark.parametrize("algorithm", ["ppo", "lora-ppo", "j-hydra-ppo", "hydra-ppo"])
def test_a_ppo_update_equals_the_reference(files, tmp_path, algorithm, shaping):
    two_models = {"reward_model": str(files / "reward_model")} if algorithm in ("ppo", "lora-ppo") else {}
    settings = {"num_ppo_epochs": 2, "critic_learning_rate": 3e-3, "max_grad_norm": 0.3, "weight_decay": 0.01}
    run = Run(files, algorithm, output_dir=str(tmp_path / "out"), **settings, **two_models, **shaping)
    before = run.nets(tmp_path / "before")
    metrics = run.phase.step(0)
    joint = algorithm == "j-hydra-ppo"
    if joint:
        before["critic"].adapter = before["actor"].adapter
    losses = reference.ppo(before, run.sequences(), run.rollout.finished, run.config, joint=joint)
    got = metrics["loss/policy_avg"] + run.config.vf_coef * metrics["loss/value_avg"]
    assert got == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert_same(run.nets(tmp_path / "after"), before)


@pytest.mark.parametrize(
    ("rank", "own"), [(0, False), (4, False), (0, True)], ids=["whole", "adapter", "own reward model"]
)
@pytest.mark.parametrize(
    ("mode", "loss"), [("cumulative", "sequence"), ("one-step", "token-mean")], ids=["cumulative", "one-step"]
)
def test_a_remax_update_equals_the_reference(files, tmp_path, mode, loss, rank, own):
    out, settings = str(tmp_path / "out"), {"reward_model": str(files / "reward_model")} if own else {}
    run = Run(files, "remax", output_dir=out, kl_mode=mode, loss=loss, lora_r=rank, **SHAPED, **settings)
    before = run.nets(tmp_path / "before")
    pairs = []
    score = run.phase.sampler.score

    def spy(rollout, greedy, *rest, **options):
        score(rollout, greedy, *rest, **options)
        pairs.append((copy.deepcopy(rollout), copy.deepcopy(greedy)))

    run.phase.sampler.score = spy
    metrics = run.phase.step(0)
    sampled, greedy = pairs[0]
    finished = sampled.finished, greedy.finished
    losses = reference.remax(before, run.sequences(sampled), run.sequences(greedy), finished, run.config)
    assert metrics["loss/policy_avg"] == pytest.approx(losses[0], abs=1e-5, rel=1e-5)
    assert_same(run.nets(tmp_path / "after"), before)


@pytest.mark.parametrize("algorithm", ["sft", "reward", "hydra-sft"])
def test_a_supervised_update_equals_the_reference(files, tmp_path, algorithm):
    run = Run(files, algorithm, output_dir=str(tmp_path / "out"), gradient_accumulation_steps=2, weight_decay=0.1)
    before = run.nets(tmp_path / "before")
    batch = [run.phase.rows[i] for i in run.phase.order.at(0)]
    if algorithm == "sft":
        batch = [Pair(row.prompt, row.completion, row.completion) for row in batch]
    metrics = run.phase.step(0)
    if algorithm == "hydra-sft":
        before["reward"].weights = before["actor"].weights
    losses = reference.supervised(before, batch, run.config)
    assert metrics["loss"] == pytest.approx(losses[0], abs=1e-5, rel=1e-5)
    assert_same(run.nets(tmp_path / "after"), before)


class Pair:
    def __init__(self, prompt, chosen, rejected):
        self.prompt, self.chosen, self.rejected = prompt, chosen, rejected


@pytest.mark.parametrize("algorithm", ["hydra-ppo", "remax"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_the_update_does_not_depend_on_the_micro_batch(files, tmp_path, algorithm, size):
    def after(micro, place):
        run = Run(
            files, algorithm, output_dir=str(tmp_path / "out"), per_device_train_batch_size=micro, num_mini_batches=2
        )
        run.phase.step(0)
        return run.nets(tmp_path / place)

    assert_same(after(size, "got"), after(2, "expected"))


@pytest.mark.parametrize("algorithm", ONLINE)
def test_rollout_and_first_update_pass_agree_and_the_first_kl_is_exactly_zero(files, tmp_path, algorithm):
    config = with_defaults(tiny.config(files, algorithm, output_dir=str(tmp_path / "out")).validate())
    phase, _ = core.build_phase(config, find(algorithm), load_tokenizer(config))
    metrics = phase.step(0)
    assert metrics["objective/kl"] == 0.0
    rows = transformers_model(config.model)(input_ids=torch.arange(40)[None]).logits
    assert metrics["sampling/logp_difference_max"] <= max(1e-5, 4e-6 * rows.std().item())
    assert metrics["grad_norm"] > 0


def test_the_first_ratio_is_one(files, tmp_path):
    run = Run(files, "hydra-ppo", output_dir=str(tmp_path / "out"), num_ppo_epochs=1)
    metrics = run.phase.step(0)
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/approxkl_avg"] < 1e-9
    assert metrics["policy/clipfrac_avg"] == 0.0


def test_values_are_clipped_around_the_old_ones(files, tmp_path):
    """By hand: old 0, return 1. New 0.1 is inside, 0.5 held at 0.2, and 3.0 past the return: the larger counts."""
    from types import SimpleNamespace

    from rlhf_trainer.algorithms import Counts, ppo

    config = with_defaults(tiny.config(files, "ppo", output_dir=str(tmp_path / "out")))
    new = torch.tensor([0.1, 0.5, 3.0])
    out = {"actor": SimpleNamespace(logprob=torch.zeros(3)), "critic": SimpleNamespace(value=new)}
    batch = SimpleNamespace(
        tokens=None,
        lengths=None,
        prompt_lengths=None,
        logprobs=torch.zeros(3),
        advantages=torch.zeros(3),
        values=torch.zeros(3),
        returns=torch.ones(3),
    )
    share = ppo.loss(lambda *_, **__: out, batch, Counts(3.0, 1.0), config)
    expected = 0.5 * (0.9**2 + 0.8**2 + 2.0**2) / 3
    assert share.metrics["loss/value_avg"].item() == pytest.approx(expected)
    assert share.metrics["val/clipfrac_avg"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode", ["cumulative", "one-step"])
def test_remax_advantages_have_the_papers_signs(mode):
    """A gain of 3, KL rewards -0.1, -0.2, -0.4: each token answers for the KL from itself on, or for its own."""
    from types import SimpleNamespace

    from rlhf_trainer import TrainConfig
    from rlhf_trainer.algorithms import remax

    rollout = SimpleNamespace(
        penalties=torch.tensor([-0.1, -0.2, -0.4, -1.0]),
        completion_lengths=torch.tensor([3, 1]),
        scores=torch.tensor([5.0, 0.0]),
        baselines=torch.tensor([2.0, 1.0]),
    )
    remax.advantages(rollout, TrainConfig(kl_mode=mode), {})
    expected = {"cumulative": [2.3, 2.4, 2.6, -2.0], "one-step": [2.9, 2.8, 2.6, -2.0]}[mode]
    torch.testing.assert_close(rollout.advantages, torch.tensor(expected))


@pytest.mark.parametrize("algorithm", TABLE)
def test_every_row_fills_all_defaults(algorithm):
    config = with_defaults(replace(core.TrainConfig(model="base"), algorithm=algorithm))
    shaping = ("missing_eos_penalty", "reward_clip", "advantage_clip", "reward_model", "reward_batch_size")
    shaping += ("prompts", "eval_prompts", "demonstrations", "max_active", "memory_budget")
    empty = [name for name, value in vars(config).items() if value is None and name not in shaping]
    assert empty == []


@pytest.mark.parametrize(
    ("algorithm", "copies", "adapters"),
    [
        ("ppo", 4, 0),
        ("lora-ppo", 4, 2),
        ("j-hydra-ppo", 1, 1),
        ("hydra-ppo", 1, 2),
        ("remax", 2, 0),
        ("reinforce", 2, 0),
        ("rloo", 2, 0),
        ("raft", 2, 0),
        ("superhf", 1, 1),
    ],
)
def test_layouts_hold_as_many_bases_and_adapters_as_the_papers_say(algorithm, copies, adapters):
    layout = find(algorithm).layout(with_defaults(replace(core.TrainConfig(model="base"), algorithm=algorithm)))
    assert 1 + len(layout.bases) == copies
    assert len(layout.adapters) == adapters
