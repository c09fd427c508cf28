"""A HydraModel in shards over processes trains, generates and saves as one that is whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import build
from gloo_processes import run_ranks
from safetensors import safe_open
from torch import Tensor, nn

from rlhf_kernels.generation import SamplingParams, SlicedGenerator
from rlhf_kernels.nn import HydraModel, LoraSpec, Role, shard
from rlhf_kernels.nn.lora import decoder_layers, lora_layers
from rlhf_kernels.nn.shards import fill, is_sharded, own, whole

pytestmark = pytest.mark.host

LENGTHS = [9, 5, 13, 17, 4, 11, 8, 6]
PROMPTS = [4, 1, 6, 12, 2, 3, 5, 1]
STEPS, RATE = 5, 3e-3
WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


def model_of(kind: str) -> HydraModel:
    """frozen: one base with two adapters; trained: a base that learns; tied: one whose head is its embedding, with
    transposed weights; ppo: an actor and a critic that learn beside a frozen reference; checkpointed: as frozen."""
    torch.manual_seed(7)
    adapters = {"actor": LoraSpec(r=4, alpha=8), "critic": LoraSpec(r=3, alpha=3)}
    if kind in ("frozen", "checkpointed"):
        model = HydraModel({"base": build("qwen3")}, adapters)
        for layer in lora_layers(model).values():
            for b in layer.lora_B.values():
                nn.init.normal_(b, std=0.1)
        if kind == "checkpointed":
            model.gradient_checkpointing_enable()
        return model
    reference = Role(None, "lm", "reference")
    bases = {"base": build("gpt2" if kind == "tied" else "llama"), "reference": build("llama", seed=1)}
    roles = {"actor": Role(None, "lm"), "critic": Role(None, "value"), "reference": reference}
    trained = ["base"]
    if kind == "ppo":
        bases["critic"], trained = build("llama", seed=2), ["base", "critic"]
        roles["critic"] = Role(None, "value", "critic")
    return HydraModel(bases, {}, roles, train_base=trained)


def loss_of(model: HydraModel, sequences: list[int]) -> Tensor:
    """Of some of the sequences; sums over all of them are the whole loss."""
    torch.manual_seed(3)
    pieces = torch.randint(0, 131, (sum(LENGTHS),)).split(LENGTHS)
    signs = torch.randn(sum(LENGTHS)).split(LENGTHS)
    out = model(
        torch.cat([pieces[i] for i in sequences]), [LENGTHS[i] for i in sequences],
        roles=("actor", "critic", "reference"), prompt_lengths=[PROMPTS[i] for i in sequences],
        entropy=True, divergence=("kl",), grad_fields=("logprob", "kl", "entropy"),
    )  # fmt: skip
    actor, count = out["actor"], sum(LENGTHS) - sum(PROMPTS)
    sign = torch.cat([signs[i][PROMPTS[i] :] for i in sequences])
    value = out["critic"].value
    tokens = sign * actor.logprob + 0.1 * actor.kl - 0.01 * actor.entropy + 0.1 * (value - sign).square()
    return tokens.sum() / count


def curve(model: HydraModel, micro_batches: int) -> list[float]:
    """The losses of all ranks' sequences together, while AdamW trains on them."""
    ranks, rank = (1, 0) if model.sharding is None else (dist.get_world_size(), dist.get_rank())
    mine = torch.arange(len(LENGTHS))[rank::ranks]
    parameters = {id(p): p for role in ("actor", "critic") for p in model.trainable_parameters(role)}.values()
    kinds = [[p for p in parameters if is_sharded(p) == sharded] for sharded in (True, False)]
    optimizer = torch.optim.AdamW([{"params": kind} for kind in kinds if kind], lr=RATE, fused=True)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for part in mine.tensor_split(micro_batches):
            loss = loss_of(model, part.tolist())
            loss.backward()
            total += loss.detach()
        if model.sharding is not None:
            dist.all_reduce(total)
            for parameter in parameters:
                if not is_sharded(parameter):
                    dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    if model.sharding is not None:
        states = [optimizer.state[p] for p in kinds[0]]  # the critic's lm head has had no gradient, and has none
        assert all(is_sharded(state["exp_avg"]) for state in states if state)
        assert bool(kinds[0]) == bool(model.trainable_bases)
    return losses


def curves(kind: str, micro_batches: int) -> tuple[list[float], list[float], float]:
    """Losses of a whole and of a sharded model; the largest difference between their trained parameters at the end."""
    alone, parts = model_of(kind), shard(model_of(kind))
    losses = curve(alone, 1), curve(parts, micro_batches)
    found = [float((whole(p) - q).detach().abs().max()) for p, q in zip(parts.parameters(), alone.parameters())]
    return *losses, max(found)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [
        ("frozen", 1),
        ("ppo", 2),
        pytest.param("frozen", 2, marks=pytest.mark.slow),
        pytest.param("checkpointed", 1, marks=pytest.mark.slow),
        pytest.param("trained", 1, marks=pytest.mark.slow),
        pytest.param("tied", 2, marks=pytest.mark.slow),
        pytest.param("ppo", 1, marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_is_that_of_one_process(world: int, kind: str, micro_batches: int) -> None:
    for alone, parts, parameters in run_ranks(world, curves, kind, micro_batches):
        assert alone[-1] < alone[0] - 0.05  # it learns
        worst = max(abs(a - b) for a, b in zip(alone, parts))
        assert worst < 1e-5
        # Adam makes steps of rounding where a gradient is 0 but for it: the biases of GPT-2's keys move as they like
        assert parameters < (2 * STEPS * RATE if kind == "tied" else 1e-3)
    print(f"{world} processes, {kind}, {micro_batches} micro-batches: losses {worst:.1e}, parameters {parameters:.1e}")


def what_lies_where() -> dict[str, Any]:
    """Numbers of a frozen base held on this rank: at rest, and while a layer runs."""
    model = shard(model_of("frozen"))
    base = model.decoder("base")
    layers = decoder_layers(base)[1]
    total = sum(p.numel() for p in model_of("frozen").decoder("base").parameters() if p.ndim)
    adapters = sum(p.numel() for role in ("actor", "critic") for p in model.trainable_parameters(role))
    seen: list[list[bool]] = []
    for layer in layers:
        layer.mlp.register_forward_hook(
            lambda *_: seen.append([not is_sharded(other.mlp.up_proj.weight) for other in layers])
        )
    loss = loss_of(model, [0, 1, 2])
    head_after = is_sharded(base.get_output_embeddings().weight)
    loss.backward()
    return {
        "held": sum(own(p).numel() for p in base.parameters()),
        "total": total,
        "adapters": adapters,
        "gathered": seen,
        "head between forward and backward": head_after,
        "afterwards": all(is_sharded(p) for n, p in base.named_parameters() if ".lora_" not in n),
    }


def test_a_layer_is_gathered_only_while_it_runs() -> None:
    for found in run_ranks(2, what_lies_where):
        base = found["total"] - found["adapters"]
        assert found["held"] - found["adapters"] <= base / 2 + 200  # uneven rows
        assert found["gathered"] == [[True, False], [False, True]]
        assert found["head between forward and backward"]
        assert found["afterwards"]


PROMPT = list(range(3, 9))
PARAMS = SamplingParams(max_new_tokens=12, temperature=0.9, seed=5, ignore_eos=True)


def prompts_of(rank: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Rank 0 has ten times the others' tokens to read and to write, and more prompts than the arena takes at once."""
    lengthy = [([7 + i, *PROMPT * 5], SamplingParams(**{**vars(PARAMS), "max_new_tokens": 40})) for i in range(6)]
    short = [([20 + rank, 4, 5], SamplingParams(**{**vars(PARAMS), "max_new_tokens": 4}))] * 6
    rows = lengthy if rank == 0 else short
    return [list(p) for p, _ in rows], [params for _, params in rows]


def generated(model: HydraModel, rank: int, every: int = 1) -> list[list[int]]:
    prompts, params = prompts_of(rank)
    generator = SlicedGenerator(model, 40_000, slice_tokens=8)
    rows = list(generator.stream(prompts, params, streams=[100 * rank + i for i in range(len(prompts))], every=every))
    return [r.tokens for r in sorted(rows, key=lambda r: r.prompt_index)]


def rollouts(how: Any) -> dict[str, Any]:
    """What this rank generates before and after a step of training, whole and in shards."""
    rank = dist.get_rank()
    alone, parts = model_of("frozen"), shard(model_of("frozen"), rollouts=how)
    base = parts.decoder("base")
    found: dict[str, Any] = {"tokens": [], "wanted": [], "sharded after": []}
    for round_ in range(2):
        found["tokens"].append(generated(parts, rank, every=1 + round_))
        found["wanted"].append(generated(alone, rank))
        found["sharded after"].append(all(is_sharded(p) for n, p in base.named_parameters() if ".lora_" not in n))
        found["losses"] = curve(alone, 1)[:2], curve(parts, 1)[:2]
    if rank == 0:  # one rank stops in the middle of its rollouts; the others go on to the end of theirs
        stream = SlicedGenerator(parts, 40_000, slice_tokens=8).stream(*prompts_of(0))
        next(stream)
        stream.close()
    else:
        generated(parts, rank)
    found["after a stop"] = float(loss_of(parts, [rank]).detach()), float(loss_of(alone, [rank]).detach())
    return found


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("how", ["whole", "steps"])
def test_ranks_with_ten_times_the_tokens_of_others_generate_what_one_process_would(how: str, world: int) -> None:
    for found in run_ranks(world, rollouts, how):
        assert found["tokens"] == found["wanted"]
        assert found["sharded after"] == [True, True]
        assert max(abs(a - b) for a, b in zip(*found["losses"])) < 1e-5
        assert abs(found["after a stop"][0] - found["after a stop"][1]) < 1e-5


def failing_rollout() -> str:
    """Rank 1's model gives NaN; rank 0 ends its rollouts all the same."""
    model = shard(model_of("frozen"), rollouts="steps")
    if dist.get_rank() == 1:
        next(iter(model.trainable_parameters("actor"))).data.fill_(float("nan"))
    try:
        generated(model, dist.get_rank())
    except FloatingPointError as error:
        return str(error)
    return "ended"


def test_a_rank_that_fails_while_generating_leaves_no_other_waiting() -> None:
    first, second = run_ranks(2, failing_rollout)
    assert first == "ended"
    assert "NaN" in second


def breaking_rollout() -> None:
    """Rank 1 fails in the middle of a forward, where the others wait for it."""
    model = shard(model_of("frozen"), rollouts="steps")
    if dist.get_rank() == 1:
        last = decoder_layers(model.decoder("base"))[1][-1]
        last.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    generated(model, dist.get_rank())


def test_a_rank_that_fails_inside_a_forward_ends_at_once() -> None:
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*ZeroDivisionError"):
        run_ranks(2, breaking_rollout)


def contents(path: Path) -> Any:
    """Bytes, or a safetensors file's tensors and metadata, whose order in the file is not fixed."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(str(path), framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}


def saved(kind: str, folder: str) -> None:
    model, alone = shard(model_of(kind)), model_of(kind)
    model.save_pretrained(Path(folder) / "shards")
    dist.barrier()
    if dist.get_rank() == 0:
        alone.save_pretrained(Path(folder) / "whole")
    parameter = next(p for p in model.parameters() if is_sharded(p))
    value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    fill(parameter, value)
    assert torch.equal(whole(parameter), value)


@pytest.mark.parametrize("kind", ["frozen", "ppo"])
def test_what_is_saved_is_what_one_process_saves(kind: str, tmp_path: Path) -> None:
    run_ranks(2, saved, kind, str(tmp_path))
    names = sorted(str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole").rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(tmp_path / "shards")) for p in (tmp_path / "shards").rglob("*.*"))
    for name in names:
        assert contents(tmp_path / "whole" / name) == contents(tmp_path / "shards" / name), name


def mistakes() -> list[str]:
    said = []
    model = HydraModel({"base": build("llama")}, {"actor": LoraSpec(r=2, alpha=2, target_modules=["q_proj"])})
    attempts = [
        lambda: shard(model, rollouts="half"),  # type: ignore[arg-type]
        lambda: shard(model),
        lambda: shard(model),
        lambda: model.add_adapter("critic", LoraSpec(r=2, alpha=2)),
        lambda: model.add_adapter("other", LoraSpec(r=2, alpha=2, target_modules=["q_proj"])),
    ]
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_mistakes_are_named() -> None:
    (said,) = run_ranks(1, mistakes)
    assert said == [
        "rollouts is 'half'; it must be one of whole, steps",
        "model is sharded already",
        "adapters: model.layers.0.self_attn.k_proj has had none and is sharded by now; attach adapters before `shard`",
    ]
