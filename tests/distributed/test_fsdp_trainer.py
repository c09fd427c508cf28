"""Training with the bases in shards over processes is training on one, whatever the shares; and so is going on."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from gloo_processes import run_ranks
from safetensors import safe_open
from same_metrics import assert_same_metrics

from rlhf_trainer import TrainConfig, core
from rlhf_trainer.errors import UserError
from rlhf_trainer.metrics import read_lines

sys.path.append(str(Path(__file__).parent.parent / "trainer"))
import tiny

# Seven prompts or rows: two processes have unequal shares, and unequal numbers of micro-batches of one or two.
CASES: dict[str, dict[str, Any]] = {
    "hydra-ppo": {"num_ppo_epochs": 2, "num_mini_batches": 2, "per_device_train_batch_size": 1},
    "ppo": {"per_device_train_batch_size": 2, "fsdp_rollouts": "steps"},
    "remax": {"reward": ["test_fsdp_trainer:length"], "eval_steps": 1, "fsdp_rollouts": "steps", "lora_r": 4},
    "dpo": {"lora_r": 4, "precompute_ref_logprobs": True, "per_device_train_batch_size": 7},
    "sft": {"lora_r": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 7, "weight_decay": 0.1},
    "inpo": {"num_generations": 3, "lora_r": 0, "rounds": 2, "fsdp_rollouts": "whole"},
}  # fmt: skip
QUICK = ("hydra-ppo", "ppo")


def length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward: the number of words."""
    return [float(len(completion.split())) for completion in completions]


def fails_on_one(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    if os.environ.get("RANK") == "1":
        raise RuntimeError("no luck here")
    return length(prompts, completions)


def config_of(folder: Path, algorithm: str, **changes: Any) -> TrainConfig:
    more = {"rollout_batch_size": 7} | CASES[algorithm] | changes
    if algorithm == "remax":
        more["eval_prompts"] = tiny.prompts(folder / "one.jsonl", 1)
    return tiny.config(folder, algorithm, **more)


def trained(jobs: list[dict[str, Any]]) -> list[str | None]:
    """Runs the jobs on this rank as a launcher would have them; what each ended with."""
    os.environ |= {name: str(dist.get_rank()) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(dist.get_world_size()) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    said: list[str | None] = []
    for job in jobs:
        try:
            core.train(TrainConfig(**job))
            said.append(None)
        except UserError as error:
            said.append(str(error))
    return said


def tensors(file: Path) -> dict[str, Any]:
    with safe_open(str(file), framework="pt") as found:
        return {name: found.get_tensor(name) for name in sorted(found.keys())}


def assert_same_runs(folder: Path, other: Path) -> None:
    """Metrics, weights and optimiser states agree within float error, and the results have the same files."""
    assert_same_metrics(folder, other)
    files = [sorted(str(p.relative_to(place)) for p in place.rglob("*.safetensors")) for place in (folder, other)]
    assert files[0] == files[1]
    for name in files[0]:
        if name.endswith("rng.safetensors"):
            continue
        weights, expected = tensors(folder / name), tensors(other / name)
        assert weights.keys() == expected.keys()
        assert all((weights[n] - x).abs().max() < 2e-5 for n, x in expected.items()), name


def assert_resumes(straight: Path, halves: Path) -> None:
    """Bit for bit, AdamW's state as well."""
    for name in ("model", "optimizer"):
        one, other = (tensors(place / "checkpoint-2" / f"{name}.safetensors") for place in (straight, halves))
        assert one.keys() == other.keys()
        assert all(bool((other[n] == value).all()) for n, value in one.items()), name


def same_as_alone(folder: Path, algorithm: str, world: int) -> None:
    alone = config_of(folder, algorithm, output_dir=str(folder / "alone"))
    core.train(alone)
    whole = replace(alone, fsdp=True, output_dir=str(folder / "shards"))
    first = replace(whole, output_dir=str(folder / "halves"), total_steps=1)
    jobs = [whole, first, replace(first, total_steps=2, resume=True)] if algorithm != "inpo" else [whole]
    said = run_ranks(world, trained, [asdict(job) for job in jobs])
    assert said == [[None] * len(jobs)] * world
    assert_same_runs(folder / "shards", folder / "alone")
    if algorithm == "inpo":  # its rounds depend on total_steps
        return
    assert_resumes(folder / "shards", folder / "halves")


@pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_two_processes_train_as_one_and_go_on_bit_for_bit(algorithm: str, tmp_path: Path) -> None:
    same_as_alone(tmp_path, algorithm, 2)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["hydra-ppo", "ppo"])
def test_four_processes_train_as_one(algorithm: str, tmp_path: Path) -> None:
    same_as_alone(tmp_path, algorithm, 4)


@pytest.mark.slow
def test_masters_of_half_precision_weights_lie_in_shards_and_come_back(tmp_path: Path) -> None:
    alone = config_of(tmp_path, "sft", dtype="bfloat16", output_dir=str(tmp_path / "alone"))
    wanted = core.train(alone).history
    whole = replace(alone, fsdp=True, output_dir=str(tmp_path / "shards"))
    first = replace(whole, output_dir=str(tmp_path / "halves"), total_steps=1)
    jobs = [whole, first, replace(first, total_steps=2, resume=True)]
    assert run_ranks(2, trained, [asdict(job) for job in jobs]) == [[None] * 3] * 2
    found = list(read_lines(tmp_path / "shards" / "metrics.jsonl"))
    assert [row["loss/sft"] for row in found] == pytest.approx([row["loss/sft"] for row in wanted], abs=2e-2)
    assert any(name.startswith("master.") for name in tensors(tmp_path / "shards/checkpoint-2/optimizer.safetensors"))
    assert_resumes(tmp_path / "shards", tmp_path / "halves")


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_stops_all_after_a_checkpoint(tmp_path: Path) -> None:
    failing = config_of(tmp_path, "remax", reward=["test_fsdp_trainer:fails_on_one"], fsdp=True)
    after = config_of(tmp_path, "sft", fsdp=True, output_dir=str(tmp_path / "after"))
    (first, second) = run_ranks(2, trained, [asdict(failing), asdict(after)])
    assert first == second
    assert "reward 'test_fsdp_trainer:fails_on_one' raised RuntimeError('no luck here')" in str(first[0])
    assert first[1] is None
    assert (Path(failing.output_dir) / "checkpoint-0").is_dir()


def test_shards_want_several_processes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fsdp: shards lie over several processes"):
        core.train(config_of(tmp_path, "sft", fsdp=True))
