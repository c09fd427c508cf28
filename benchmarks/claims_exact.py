"""Dynamic LoRA is exact: with adapters off, a model in training gives the bits of a copy that was loaded apart.

Compared are logits, log-probabilities and rewards of the same sequences in the same packed shape, before the first and
after the last update; and actor with reference within one call before the first update, where their KL must be 0.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims_record import Claim, Data, Part
from benchmarks.claims_scale import Scale, Workshop
from benchmarks.tables import grid

METHODS = ("hydra-ppo", "j-hydra-ppo", "lora-ppo", "remax")
EPOCHS = 2
LENGTHS = (7, 19, 12, 31, 16, 5)  # tokens of the sequences compared
OFF = ("reference", "reward")


def measure(scale: Scale, workshop: Workshop) -> Data:
    base = _demo_with_reward_head(workshop.folder / "demo")
    rows = [_compare(name, base, dtype, scale) for name in METHODS for dtype in scale.dtypes]
    return {"rows": rows, "updates": scale.updates}


def _demo_with_reward_head(folder: Path) -> Path:
    """The embedded checkpoint, with a random reward head: exactness does not depend on what it prefers."""
    from safetensors.torch import save_file

    from rlhf_trainer.demo import checkpoint_path

    shutil.copytree(checkpoint_path(), folder, ignore=shutil.ignore_patterns("*.jsonl"), dirs_exist_ok=True)
    torch.manual_seed(0)
    save_file({"reward.weight": 0.1 * torch.randn(1, 128)}, folder / "heads.safetensors")
    return folder


def _compare(algorithm: str, base: Path, dtype: str, scale: Scale) -> Data:
    from rlhf_trainer.algorithms import find, with_defaults
    from rlhf_trainer.core import build_phase
    from rlhf_trainer.demo import settings
    from rlhf_trainer.models import build, load_tokenizer

    changes: dict[str, Any] = {
        "total_steps": scale.updates // EPOCHS,
        "num_ppo_epochs": EPOCHS,
        "rollout_batch_size": 16,
    }
    changes |= {"device": scale.device, "dtype": dtype, "eval_prompts": None, **settings.ADAPTERS}
    config = settings.online(algorithm, base, base / "never-written", **changes)
    config = with_defaults(replace(config, lr_scheduler_type="constant").validate())
    row = find(algorithm)
    torch.manual_seed(0)
    phase, policy = build_phase(config, row, load_tokenizer(config))
    frozen = build(config, row).model  # loaded again and never trained: the same packed shape in every call
    batch = _sequences(int(policy.model.decoder("base").config.vocab_size))
    found: Data = {"method": algorithm, "dtype": dtype}
    roles = tuple(name for name in ("actor", "critic", *OFF) if name in policy.model.roles)
    out = policy.model.score(*batch, ("actor", "reference"), divergence=("kl",))
    found["kl_before"] = _difference(out["actor"].kl, torch.zeros(1))
    found["logprob_difference_before"] = _difference(out["actor"].logprob, out["reference"].logprob)
    found["before"] = _off(policy.model, frozen, batch, roles)
    found["objective_kl_at_step_0"] = phase.step(0)["objective/kl"]
    for step in range(1, config.total_steps):
        phase.step(step)
    found["updates"] = phase.optimizer.updates
    found["after"] = _off(policy.model, frozen, batch, roles)
    moved = policy.model.score(*batch, ("actor",))["actor"].logprob
    found["actor_moved"] = _difference(moved, frozen.score(*batch, ("actor",))["actor"].logprob)
    return found


def _sequences(vocabulary: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(2, vocabulary, (sum(LENGTHS),), generator=draw), torch.tensor(LENGTHS)


def _off(model: Any, frozen: Any, batch: tuple[Tensor, Tensor], roles: tuple[str, ...]) -> dict[str, float]:
    """Largest differences with the adapters off: in a call of all roles, in one without adapters, and of logits."""
    found = {}
    for name, asked in (("all roles", roles), ("alone", OFF)):
        ours, theirs = model.score(*batch, asked), frozen.score(*batch, asked)
        found[f"logprobs, {name}"] = _difference(ours["reference"].logprob, theirs["reference"].logprob)
        found[f"rewards, {name}"] = _difference(ours["reward"].reward, theirs["reward"].reward)
    found["logits"] = _difference(_logits(model, batch), _logits(frozen, batch))
    return found


def _logits(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    from rlhf_kernels.integrations.transformers import PackedRows

    tokens, lengths = (part.to(model.device) for part in batch)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths.tolist()])
    return model.decode(
        "reference", tokens, positions, PackedRows(ends), torch.arange(len(tokens), device=model.device)
    )


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    """0 only where every bit but the sign of a zero agrees."""
    assert a is not None
    assert b is not None
    largest = float((a.float() - b.float()).abs().max())
    return largest if largest == largest else float("inf")


def markdown(data: Data) -> str:
    rows = []
    for row in data["rows"]:
        worst = [max(row[when].values()) for when in ("before", "after")]
        cells = [_bits(value) for value in worst] + [_bits(row["kl_before"]), _bits(row["objective_kl_at_step_0"])]
        rows.append([f"{row['method']}, {row['dtype']}", str(row["updates"]), *cells, f"{row['actor_moved']:.2f}"])
    names = (
        "", "updates", "off against a frozen copy, before", "after", "KL of actor and reference before",
        "objective/kl of step 0", "the actor's log-probabilities moved by",
    )  # fmt: skip
    text = (
        f"The embedded 0.9M model with a random reward head, {len(LENGTHS)} sequences of {min(LENGTHS)} to "
        f"{max(LENGTHS)} tokens. The off columns are the largest difference in logits, log-probabilities and rewards, "
        f"in calls of all roles and of the roles without an adapter; the last column shows that the policy did move. "
        f"`remax` has `lora_r` 16 here."
    )
    return "\n\n".join([text, grid(names, rows)])


def _bits(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def claims(data: Data) -> list[Claim]:
    off = max(value for row in data["rows"] for when in ("before", "after") for value in row[when].values())
    kl = max(abs(row[key]) for row in data["rows"] for key in ("kl_before", "objective_kl_at_step_0"))
    least = min(row["updates"] for row in data["rows"])
    return [
        Claim(
            f"adapters off = a frozen copy, before and after {least} updates", "exact",
            "every bit equal" if off == 0 else f"differs by {off:.1e}", off == 0,
        ),
        Claim("KL of actor and reference at step 0", "0", _bits(kl), kl == 0),
    ]  # fmt: skip


PART = Part("exact", measure, markdown, claims)
